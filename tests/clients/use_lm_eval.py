"""lm-eval: https://github.com/EleutherAI/lm-evaluation-harness, with two tasks of our own

Its numbers are compared with those that transformers computes from the same folder.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

URL = os.environ["OPENAI_BASE_URL"]
FOLDER = os.environ["MODEL_FOLDER"]  # for its tokenizer
HERE = Path(__file__).parent


def lm_eval(model: str, url: str, task: str, *options: str, **arguments: object) -> list[dict]:
    """What lm-eval logs of each sample."""
    output = tempfile.mkdtemp()
    given = {"model": "smollm2-135m", "base_url": url, **arguments}
    command = [Path(sys.executable).with_name("lm_eval"), "run", "--model", model]
    command += ["--model_args", ",".join(f"{key}={value}" for key, value in given.items())]
    command += ["--tasks", task, "--include_path", ".", "--log_samples", "--output_path", output]
    # the data file of the tasks is named relative to their folder
    subprocess.run([*command, *options], cwd=HERE / "lm_tasks", check=True, stdout=sys.stderr)
    (samples,) = Path(output).rglob("samples_*.jsonl")
    return [json.loads(line) for line in samples.read_text().splitlines()]


def computed(pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    """The same by transformers, which is where Moorage is installed: here there is no torch."""
    command = [os.environ["MOORAGE_PYTHON"], HERE / "loglikelihood.py", FOLDER]
    done = subprocess.run(
        command, input=json.dumps(pairs), stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def compare(samples: list[dict], context: str | None = None) -> list[bool]:
    """Compare what was found with what is computed; returns whether each was the likeliest."""
    pairs, found = [], []
    for sample in samples:
        asked = [tuple(request.values()) for request in sample["arguments"].values()]
        pairs += [words if context is None else (context, *words) for words in asked]
        found += [answer for (answer,) in sample["resps"]]
    assert len(found) == len(pairs) > 0
    for answer, (total, greedy) in zip(found, computed(pairs), strict=True):
        if context is None:
            answer, told = answer
            assert str(told) == str(greedy)
        assert math.isclose(float(answer), total, abs_tol=1e-3), (answer, total)
    return [str(greedy) == "True" for _, greedy in found] if context is None else []


COMPLETIONS = ("local-completions", f"{URL}/completions")

samples = lm_eval(*COMPLETIONS, "capitals", "--batch_size", "4", tokenizer=FOLDER)
assert any(compare(samples))
assert sum(sample["acc"] for sample in samples[:3]) == 3
print("loglikelihood of token ids")

samples = lm_eval(
    *COMPLETIONS, "capitals", tokenizer=FOLDER, tokenized_requests=False, num_concurrent=3
)
assert any(compare(samples))
print("loglikelihood of texts")

samples = lm_eval(*COMPLETIONS, "perplexity", "--batch_size", "4", tokenizer=FOLDER)
compare(samples, context="<|im_start|>")  # the token that lm-eval begins texts with
print("loglikelihood_rolling")

samples = lm_eval(*COMPLETIONS, "answers", tokenizer=FOLDER)
assert "Paris" in samples[0]["resps"][0][0]
print("generate_until")

samples = lm_eval(
    "local-chat-completions", f"{URL}/chat/completions", "answers", "--apply_chat_template"
)
assert "Paris" in samples[0]["resps"][0][0]
print("generate_until of a chat")
