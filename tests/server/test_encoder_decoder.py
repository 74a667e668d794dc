"""A T5 behind gunicorn: completions are answered as `generate` would, chats are refused."""

import json
import signal
from pathlib import Path
from typing import Any

import requests
import torch
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig
from transformers import T5Config
from transformers import T5ForConditionalGeneration

from tests.server.process import ROOT
from tests.server.process import Server
from tests.server.process import wait_for
from tests.support.tiny import IM_END
from tests.support.tiny import IM_START
from tests.support.tiny import VOCAB
from tests.support.tiny import tiny_tokenizer

CONF = str(ROOT / "gunicorn.conf.py")
PROMPT = "translate English to German: a small house"


def saved(folder: Path) -> tuple[T5ForConditionalGeneration, Any]:
    """A tiny T5 whose tokenizer ends every prompt, as T5's own does, and has no chat template."""
    config = T5Config(
        vocab_size=VOCAB,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=IM_START,
        eos_token_id=IM_END,
        pad_token_id=IM_START,
        dropout_rate=0.0,
        n_positions=300,
    )
    torch.manual_seed(3)
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=IM_START, eos_token_id=IM_END, pad_token_id=IM_START
    )
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", IM_END)]
    )
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def test_an_encoder_decoder_is_served(tmp_path: Path) -> None:
    model, tokenizer = saved(tmp_path / "tiny-t5")
    given = tokenizer(PROMPT, return_tensors="pt")
    assert given["input_ids"][0, -1] == IM_END
    out = model.generate(
        input_ids=given["input_ids"], do_sample=False, num_beams=1, max_new_tokens=12
    )
    expected = tokenizer.decode(out[0], skip_special_tokens=True)
    deployment = {"model": str(tmp_path / "tiny-t5"), "strategy": "cpu", "max_context": 4096}
    document = {
        "version": 1,
        "server": {"bind": "127.0.0.1:0", "threads": 16, "grace_s": 5},
        "deployments": {"here": deployment},
    }
    (tmp_path / "moorage.yaml").write_text(json.dumps(document))  # JSON is YAML
    with Server(tmp_path / "log", conf=CONF, cwd=tmp_path) as server:
        wait_for("readiness", lambda: server.port and server.try_get("/health/ready") == 200)
        url = f"http://127.0.0.1:{server.port}"
        body = {"model": "tiny-t5", "prompt": PROMPT, "temperature": 0, "max_tokens": 12}
        answer = requests.post(f"{url}/v1/completions", json=body, timeout=60).json()
        assert answer["choices"][0]["text"] == expected
        assert answer["usage"]["prompt_tokens"] == given["input_ids"].shape[1]
        chat = {"model": "tiny-t5", "messages": [{"role": "user", "content": "hello"}]}
        refused = requests.post(f"{url}/v1/chat/completions", json=chat, timeout=60)
        assert refused.status_code == 400
        assert "this model has no chat template" in refused.json()["error"]["message"]
        told = requests.get(f"{url}/placement", timeout=60).json()
        assert told["engine"] == {
            "path": "plain",
            "why": "it is an encoder-decoder",
            "graphs": False,
            "compiled": False,
            "kv_reserved": {},
            "hangs": None,
        }
        assert told["kv"]["planned_tokens"] == 300 * 8  # as its n_positions allows
        assert told["certificate"]["valid"]
        server.signal(signal.SIGTERM)
        assert server.exit_status() == 0
        assert "Traceback" not in server.log()
