"""GET /docs: a page that shows /openapi.json, from files that are here. No other host is asked."""

from flask import Flask
from flask import Response

from service.web import routes
from service.web.files import STATIC
from service.web.files import sent
from service.web.routes import Operation

SWAGGER_UI = STATIC / "swagger-ui"


def add_routes(app: Flask) -> None:
    def docs() -> Response:
        return sent(STATIC / "docs.html")

    def docs_script() -> Response:
        return sent(STATIC / "docs.js")

    def docs_bundle() -> Response:
        return sent(SWAGGER_UI / "swagger-ui-bundle.js")

    def docs_style() -> Response:
        return sent(SWAGGER_UI / "swagger-ui.css")

    page = Operation("The OpenAPI document as a page", "text/html")
    script = Operation("A script of that page", "text/javascript")
    style = Operation("The style of that page", "text/css")
    routes.add(app, "/docs", docs, page)
    routes.add(app, "/docs/docs.js", docs_script, script)
    routes.add(app, "/docs/swagger-ui-bundle.js", docs_bundle, script)
    routes.add(app, "/docs/swagger-ui.css", docs_style, style)
