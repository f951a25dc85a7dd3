"""Pictures given as URLs. The service fetches what strangers name, from inside a network that they are not in.

What protects that network: hosts must be allowed by name; a name is resolved once, by the resolver of the connection
itself, which lets only public addresses through, so that what was checked is what is connected to; redirects are
followed by hand, each checked like the first URL; and errors say nothing of what was found.
"""

import asyncio
import ipaddress
import re
import socket
from typing import NamedTuple

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from rayclip.errors import UserError
from rayclip.serve.config import UrlConfig
from rayclip.serve.images import RequestError

MAX_URL_CHARS = 2_048
"""Longer ones are refused unread: parsed URLs are cached by the library that parses them."""

DEFAULT_PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)

_ENTRY = re.compile(r"\.?(\w[\w.-]*|\[[0-9A-Fa-f:.]+\])(:\d+)?")


class UrlFetcher:
    """Fetches pictures from the hosts that the settings allow. For one event loop; close() when done."""

    def __init__(self, config: UrlConfig, resolver: AbstractResolver | None = None) -> None:
        """`resolver` answers for the system's. Raises UserError for an entry of allowed_hosts that is no host."""
        self._config = config
        self._allowed = [_parse_entry(entry) for entry in config.allowed_hosts]
        self._resolver = resolver
        self._session: aiohttp.ClientSession | None = None

    async def fetch(self, url: str, param: str) -> bytes:
        """The body that `url` answers with. `param` names the picture in errors.

        Raises RequestError 422: urls_off, url_invalid, url_not_allowed, url_redirects, url_status, url_too_large,
        url_timeout, url_unreachable.
        """
        try:
            if not self._allowed:
                raise _refusal("URLs are switched off here; send pictures in base64 or as files", "urls_off")
            async with asyncio.timeout(self._config.timeout_s):
                return await self._follow(url)
        except RequestError as error:
            error.param = param
            raise
        except TimeoutError:
            message = f"the URL was not answered within {self._config.timeout_s:g} seconds"
            raise RequestError(422, message, "url_timeout", param) from None
        except (aiohttp.ClientError, OSError, ValueError):
            # In these words whatever happened: the details would tell strangers about the network.
            raise RequestError(422, "the URL cannot be fetched", "url_unreachable", param) from None

    async def close(self) -> None:
        """Close the connections that are open."""
        if self._session is not None:
            await self._session.close()

    async def _follow(self, text: str) -> bytes:
        url = self._check(_parse_url(text))
        for _ in range(self._config.max_redirects + 1):
            async with self._open_session().get(url, allow_redirects=False) as response:
                if response.status not in REDIRECTS:
                    return await self._read(response)
                target = _parse_url(response.headers.get("Location", ""))
            url = self._check(url.join(target))
        raise _refusal(f"the URL redirects more than {self._config.max_redirects} times", "url_redirects")

    def _check(self, url: URL) -> URL:
        """The URL, if it may be fetched as far as its text tells. Raises RequestError."""
        if url.scheme not in self._config.schemes:
            raise _refusal(f"a URL must begin with {' or '.join(self._config.schemes)}", "url_not_allowed")
        if url.raw_host is None:
            raise _refusal("the URL names no host", "url_invalid")
        if "@" in url.raw_authority:
            raise _refusal("a URL must not hold a name or a password", "url_not_allowed")
        if not any(entry.matches(url) for entry in self._allowed):
            raise _refusal("pictures are not fetched from this host and port", "url_not_allowed")
        # The connection resolves names only, so an address that is written out is judged here.
        address = _parse_address(_plain_host(url))
        if address is not None and not self._config.allow_private and not _is_public(address):
            raise _not_public()
        return url

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        if response.status != 200:
            raise _refusal(f"the URL was answered with status {response.status}", "url_status")
        max_bytes = self._config.max_bytes
        too_large = _refusal(f"the URL's body is longer than {max_bytes} bytes", "url_too_large")
        if (response.content_length or 0) > max_bytes:
            raise too_large
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > max_bytes:
                raise too_large
        return bytes(body)

    def _open_session(self) -> aiohttp.ClientSession:
        """The session, made at the first fetch: it belongs to the event loop that runs then."""
        if self._session is None:
            resolver = self._resolver or aiohttp.ThreadedResolver()
            if not self._config.allow_private:
                resolver = _PublicResolver(resolver)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False),
                timeout=aiohttp.ClientTimeout(total=None),  # fetch() holds the time over all redirects
                headers={"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "rayclip"},
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,  # a proxy would resolve the name anew
                auto_decompress=False,  # a short body must not become a long one
            )
        return self._session


class _PublicResolver(AbstractResolver):
    """Another resolver's answers, but only where every address is public.

    The connection is made to the very addresses that are returned here, so a name that resolves differently at a
    second time gains nothing.
    """

    def __init__(self, resolver: AbstractResolver) -> None:
        self._resolver = resolver

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        results = await self._resolver.resolve(host, port, family)
        addresses = [_parse_address(result["host"]) for result in results]
        if not all(address is not None and _is_public(address) for address in addresses):
            raise _not_public()
        return results

    async def close(self) -> None:
        await self._resolver.close()


class _AllowedHost(NamedTuple):
    """An entry of allowed_hosts: a name as it goes over the wire, and its port if it has one."""

    name: str
    with_subdomains: bool
    port: int | None

    def matches(self, url: URL) -> bool:
        """Whether the URL's host is this one, at this port or else at the scheme's own."""
        if url.port != (DEFAULT_PORTS[url.scheme] if self.port is None else self.port):
            return False
        host = _plain_host(url)
        return host == self.name or (self.with_subdomains and host.endswith(f".{self.name}"))


def _parse_entry(entry: str) -> _AllowedHost:
    mistake = UserError(
        f"urls.allowed_hosts: '{entry}' must be HOST, HOST:PORT, or with a dot in front for subdomains too"
    )
    if not _ENTRY.fullmatch(entry):
        raise mistake
    try:
        url = URL(f"//{entry.removeprefix('.')}")
    except ValueError:  # a port above 65535, a name that IDNA does not know
        raise mistake from None
    return _AllowedHost(_plain_host(url), entry.startswith("."), url.explicit_port)


def _parse_url(text: str) -> URL:
    if not text or len(text) > MAX_URL_CHARS:
        raise _refusal(f"a URL must have 1 to {MAX_URL_CHARS} characters", "url_invalid")
    try:
        return URL(text)
    except ValueError:
        raise _refusal("the URL is not well formed", "url_invalid") from None


def _plain_host(url: URL) -> str:
    """The host in lower case, in ASCII (IDNA), without the dot that may end it."""
    return (url.raw_host or "").lower().removesuffix(".")


def _parse_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is one of the internet's. Stricter than is_global, which holds multicast and more."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return _is_public(address.ipv4_mapped)
        # 6to4 carries an IPv4 address of anyone's choice; site-local ones are old private ones.
        if address.sixtofour is not None or address.is_site_local:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


def _refusal(message: str, code: str) -> RequestError:
    return RequestError(422, message, code)


def _not_public() -> RequestError:
    return _refusal("the URL's host has an address that is not public", "url_not_allowed")
