"""What the operator and the client see of an error."""

from service.errors import ConfigError
from service.errors import DoesNotFit
from service.errors import Problem


def test_a_config_error_shows_lines_on_a_terminal_and_one_line_in_a_log():
    error = ConfigError(
        [
            Problem("moorage.yaml:5:5", "strategy", "unknown strategy 'x'", "    strategy: x", 5),
            Problem("env QUANTIZE", "quantize", "quantize is '5bit'; give 4bit"),
        ]
    )
    assert error.message.splitlines() == [
        "moorage.yaml:5:5: strategy: unknown strategy 'x'",
        "       strategy: x",
        "       ^",
        "env QUANTIZE: quantize is '5bit'; give 4bit",
    ]
    assert error.one_line() == (
        "moorage.yaml:5:5: strategy: unknown strategy 'x'; "
        "env QUANTIZE: quantize is '5bit'; give 4bit"
    )


def test_one_line_has_the_way_out():
    error = DoesNotFit("too\n  large", hint="buy a larger\ncard")
    assert error.one_line() == "too large  fix: buy a larger card"
    assert error.as_dict()["hint"] == "buy a larger\ncard"


def test_a_bare_error_holds_no_frame():
    try:
        try:
            raise KeyError("x")
        except KeyError as cause:
            raise DoesNotFit("no") from cause
    except DoesNotFit as error:
        bare = error.bare()
    assert bare.__traceback__ is None
    assert bare.__cause__ is None
    assert bare.__context__ is None
