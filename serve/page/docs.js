// The specification in Swagger UI. Requests go to where the page came from, below whatever prefix that is.

const base = new URL(".", location.href);

const specification = await (await fetch(new URL("openapi.json", base))).json();
specification.servers = [{ url: base.pathname.replace(/\/$/, "") || "/" }];
SwaggerUIBundle({ spec: specification, dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null });
