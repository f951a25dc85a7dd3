"""What the cache keeps, and what it lets go of."""

from rayclip.serve.cache import LruCache


def make():
    return LruCache(10, len)


def test_it_keeps_what_was_used_last():
    cache = make()
    for key in "abc":
        cache.put(key, key * 3)
    assert cache.get("a") == "aaa"
    cache.put("d", "dddd")  # 13 bytes: the one used longest ago goes
    assert (cache.get("b"), cache.get("a"), cache.get("c"), cache.get("d")) == (None, "aaa", "ccc", "dddd")
    assert (cache.num_bytes, cache.hits, cache.misses) == (10, 4, 1)


def test_a_key_put_again_counts_once():
    cache = make()
    cache.put("a", "aaaa")
    cache.put("a", "aa")
    assert (cache.num_bytes, len(cache), cache.get("a")) == (2, 1, "aa")


def test_what_is_larger_than_all_of_it_is_not_kept():
    cache = make()
    cache.put("a", "a" * 11)
    assert (cache.num_bytes, len(cache), cache.get("a")) == (0, 0, None)


def test_drop_lets_go_of_what_meets_the_condition():
    cache = make()
    for key in "abc":
        cache.put(key, key)
    cache.drop(lambda key: key != "b")
    assert (cache.num_bytes, cache.get("a"), cache.get("b")) == (1, None, "b")
