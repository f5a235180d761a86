"""Three steps of benchmarks/rl.py with the real engines, on the checkpoint given; prints what test_rl.py holds.

Usage: python tests/rl_steps.py CHECKPOINT FOLDER
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import rl
import torch


def low_bytes(response: bytes) -> float:
    """Something that a random model earns, which knows no words."""
    return sum(byte < 128 for byte in response) / max(1, len(response))


def main(checkpoint: Path, folder: Path) -> None:
    rollouts = rl.Rollouts(checkpoint, low_bytes)
    run = rl.Run(folder, "8-bit", "icepop", 0, checkpoint, learning_rate=3e-3)
    for _ in range(2):
        run.advance(rollouts)
    run.save()
    run.advance(rollouts)
    once = run.folder / "once"
    once.mkdir()
    for name in ("steps.jsonl", "train.jsonl"):
        shutil.copy(run.folder / name, once / name)
    again = rl.Run(folder, "8-bit", "icepop", 0, checkpoint, learning_rate=3e-3)
    again.advance(rollouts)

    run.policy.model.save_pretrained(folder / "learned")
    for path in checkpoint.iterdir():  # nothing but the weights is another
        if path.suffix != ".safetensors":
            shutil.copy(path, folder / "learned")
    rollouts.push(run.policy.model.state_dict())
    pushed = rollouts.sample(rl.prompts()[:4], seed=1)
    rollouts.llm.llm_engine.engine_core.shutdown()
    loaded = rl.Rollouts(folder / "learned", low_bytes).sample(rl.prompts()[:4], seed=1)
    print(
        json.dumps(
            {
                "same tokens": torch.equal(pushed.ids_BT, loaded.ids_BT),
                "same logp": torch.equal(pushed.logp_infer_BT.nan_to_num(), loaded.logp_infer_BT.nan_to_num()),
                "n tokens": int(pushed.mask.sum()),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
