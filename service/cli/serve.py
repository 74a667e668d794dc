"""`moorage serve`: the server, with gunicorn inside this process instead of around it."""

import json
import sys
from collections.abc import Mapping
from typing import Any

from service.cli import options
from service.cli import report
from service.config.reading import load_process


@report.guard
def serve(
    config: options.Config = None,
    deployment: options.Deployment = None,
    settings: options.Set = None,
    model: options.Model = None,
    strategy: options.Strategy = None,
    quantize: options.Quantize = None,
    bind: options.Bind = None,
    as_json: options.AsJson = False,
) -> None:
    """Load a model, prove its placement and serve it over HTTP until it is told to stop.

    With --json, stdout gets one line of JSON when the model may be used, or when it cannot be
    served.
    """
    from service.config import gunicorn_options

    flags = options.flags(
        config,
        deployment,
        settings,
        model=model,
        strategy=strategy,
        quantize=quantize,
        bind=bind,
    )
    loaded = load_process(flags)
    announce = _announce if as_json else gunicorn_options.say_nothing
    application(gunicorn_options.settings(loaded, announce=announce)).run()


def application(settings: Mapping[str, Any]) -> Any:
    """A gunicorn application with these settings.

    As with `gunicorn` itself, GUNICORN_CMD_ARGS comes on top.
    """
    from gunicorn.app.base import BaseApplication
    from gunicorn.util import import_app

    class Application(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
        def load_config(self) -> None:
            for name, value in settings.items():
                self.cfg.set(name, value)
            extra = self.cfg.parser().parse_args(self.cfg.get_cmd_args_from_env())
            for name, value in vars(extra).items():
                if value is not None and name in self.cfg.settings:
                    self.cfg.set(name, value)

        def load(self) -> Any:
            return import_app(self.cfg.wsgi_app)

    return Application(prog="moorage serve")


def _announce(document: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()
