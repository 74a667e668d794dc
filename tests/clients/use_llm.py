"""The `llm` command: https://llm.datasette.io/en/stable/other-models.html"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

URL = os.environ["OPENAI_BASE_URL"]
FOLDER = Path(tempfile.mkdtemp())  # instead of the user's own, which `llm logs path` tells
MODELS = Path(__file__).with_name("extra-openai-models.yaml").read_text()
(FOLDER / "extra-openai-models.yaml").write_text(MODELS.replace("http://127.0.0.1:8000/v1", URL))
QUESTION = "What is the capital of France?"
PARIS = "The capital of France is Paris."


def llm(*arguments: str) -> str:
    command = [Path(sys.executable).with_name("llm"), *arguments]
    environment = {**os.environ, "LLM_USER_PATH": str(FOLDER)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


llm("keys", "set", "moorage", "--value", os.environ["OPENAI_API_KEY"])
assert llm("-m", "moorage", "-o", "temperature", "0", QUESTION) == PARIS
print("prompt")

assert llm("-m", "moorage", "-o", "temperature", "0", "--no-stream", QUESTION) == PARIS
assert llm("-m", "moorage", "--continue", "-o", "max_tokens", "10", "And of Italy?")
print("a conversation")

schema = {
    "type": "object",
    "properties": {"capital": {"type": "string", "maxLength": 20}},
    "required": ["capital"],
}
answer = llm("-m", "moorage", "-o", "temperature", "0", "--schema", json.dumps(schema), QUESTION)
assert isinstance(json.loads(answer)["capital"], str)
print("--schema")

function = 'def weather(city: str) -> str:\n    "The weather now."\n    return f"Sunny in {city}."'
options = ["-o", "temperature", "0", "-o", "max_tokens", "60"]
assert llm("-m", "moorage", *options, "--functions", function, "--td", "The weather in Rome?")
print("--functions")

endpoint = ["openai", "endpoint", URL, "--key", os.environ["OPENAI_API_KEY"]]
assert llm(*endpoint, "--models") == "smollm2-135m"
assert llm(*endpoint, "-m", "smollm2-135m", "-o", "temperature", "0", QUESTION) == PARIS
print("openai endpoint")
