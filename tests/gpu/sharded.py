"""Plan, load and prove a model on the GPUs that this process sees, and write its logits.

python -m tests.gpu.sharded '{"folder": ..., "strategy": ..., "logits": FILE, "filled": false}'

filled: half of the first GPU is taken before it is looked at. Prints one JSON object as last line.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from service.placement import hardware
from service.placement import loading
from service.placement.certificate import certify
from service.placement.inputs import place
from tests.support.placing import built_in
from tests.support.placing import config_of

TOKENS = 64


def main() -> None:
    asked = json.loads(sys.argv[1])
    count = torch.cuda.device_count()
    total = torch.cuda.get_device_properties(0).total_memory
    # kept alive until the end
    filler = torch.empty(total // 2 if asked["filled"] else 0, dtype=torch.uint8, device="cuda:0")

    strategy = built_in().select(asked["strategy"])
    config = config_of(Path(asked["folder"]), asked["strategy"], max_context=2048, max_sequences=4)
    machine = hardware.detect(Path(asked["folder"]))
    placement = strategy.plan(config, machine)
    loaded = loading.load(strategy, config, placement, lambda share: None)
    issued = certify(loaded)
    failure = issued.failure()

    ids = torch.arange(1, TOKENS + 1, dtype=torch.int64)[None] * 3 % 251
    inputs = place(strategy.place_inputs, loaded.model, {"input_ids": ids})
    with torch.inference_mode():
        logits = loaded.model(**inputs).logits.float().cpu().contiguous()
    save_file({"logits": logits}, asked["logits"])
    print(
        json.dumps(
            {
                "cards": [str(torch.cuda.get_device_properties(i).uuid) for i in range(count)],
                "total": [gpu.total_bytes for gpu in machine.gpus],
                "free": [gpu.free_bytes for gpu in machine.gpus],
                "filler": filler.nbytes,
                "devices": placement.devices,
                "planned": {device: memory.total for device, memory in placement.memory.items()},
                "weights": {device: memory.weights for device, memory in placement.memory.items()},
                "valid": issued.valid,
                "failure": failure and failure.message,
                "seconds": round(loaded.seconds, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
