"""The line Moorage was founded on, reproduced with plain transformers on a real GPU.

These tests fail if the library ever fixes it; then our guard can go.
"""

import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.gpu
FOUNDING = "is not on the expected device meta!"
THREADS = 4
# of as many generations as there are threads; it takes luck, and rarely more than two
ROUNDS = 30


def offloaded_half(folder: Path):
    layers = {f"model.layers.{i}": 0 if i < 12 else "cpu" for i in range(24)}
    device_map = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    return AutoModelForCausalLM.from_pretrained(folder, device_map={**device_map, **layers})


def test_threads_on_an_offloaded_model_meet_the_founding_error(big_llama: Path):
    model = offloaded_half(big_llama)
    errors: list[str] = []
    texts: list[list[int]] = []
    ids = torch.arange(1, 9, device="cuda")[None]
    right = model.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist()
    start = threading.Barrier(THREADS)

    def run() -> None:
        for _ in range(ROUNDS):
            start.wait()
            if any(FOUNDING in error for error in errors):
                return
            try:
                texts.append(model.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist())
            except (RuntimeError, NotImplementedError) as error:
                errors.append(str(error).splitlines()[0])
            start.wait()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # as on a busy machine: threads meet between any two lines
    try:
        threads = [threading.Thread(target=run) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    wrong = sum(text != right for text in texts)
    made = len(texts) + len(errors)
    print(f"\nplain transformers, {made} generations: {len(errors)} raised, {wrong} wrong")
    print("\n".join(sorted(set(errors))))
    assert any(FOUNDING in error for error in errors)


@pytest.mark.parametrize("module", ["lm_head", "model.layers.3.mlp.down_proj"])
def test_a_weight_on_meta_answers_without_an_error(big_llama: Path, module: str):
    model = AutoModelForCausalLM.from_pretrained(big_llama, device_map=0)
    ids = torch.arange(1, 9, device="cuda")[None]
    right = model(ids).logits
    model.get_submodule(module).to("meta")
    wrong = model(ids).logits
    assert wrong.device.type == "cuda"
    assert not torch.equal(wrong, right)


def test_inputs_sent_to_model_device_go_to_meta_when_the_embedding_is_offloaded(big_llama: Path):
    model = AutoModelForCausalLM.from_pretrained(
        big_llama,
        device_map={"model.embed_tokens": "cpu", "model.layers": 0, "model.norm": 0,
                    "model.rotary_emb": 0, "lm_head": 0},
    )  # fmt: skip
    assert model.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        model.generate(torch.arange(1, 9)[None].to(model.device), max_new_tokens=2)
