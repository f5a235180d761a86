"""Training of the demo models, on one CPU thread.

Invariants: recipe + corpus + library versions fix the weights (own seeds, one thread, so neither the
number of cores nor a neighbour changes a sum's order); the window covers a demo prompt and its response.

The recipe was chosen so that the published effect shows in a model this small: with routers trained as
fast as the embeddings (8e-3) and without the z-loss, MoE and dense differed by 3 % only. The demo illustrates
the phenomenon; it is no evidence of its size. Both models share everything but experts and MLP width.

Numeric facts, on a two-core machine without AMX: fp32 beats bf16 here (0.3 against 0.9-1.2 s for
2,048 tokens), and a second thread saves 10 to 35 %, so the two models train beside each other, a thread each.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moediag.demo.muon import Muon
from moediag.demo.tokenizer import END_OF_TEXT_ID, VOCAB_SIZE, byte_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

MAX_LENGTH = 2048

# Two hazards of training in threads: initial weights come from torch's one global generator, and
# transformers' lazy imports fail when two threads import at once.
_setup = threading.Lock()


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a demo model but the corpus and the library versions.

    Args:
        name: folder name of the checkpoint.
        n_experts: experts per MoE layer; 0 for a dense model.
        n_active_experts: experts per token (K).
        mlp_size: width of one expert, or of the dense MLP.
        aux_loss: weight of the load-balancing loss.
        z_loss: weight of the squared log-partition of the output: it keeps logits near 0, where bf16
            is fine. Without it they sit near 8, and rounding of the output alone (both models) is 0.005.
        init_std: standard deviation of the initial weights.
        window: length of a training sequence [bytes].
        batch: sequences per step.
        muon_lr: peak learning rate of the matrices inside the layers (attention, MLP, experts).
        adam_lr: peak learning rate of embeddings and norms.
        router_lr: peak learning rate of routers. Low: at the embeddings' rate the first expert soon
            takes 0.7 of the weight and the last 0.03, and a flip of the last moves nothing. All
            rates rise linearly over ``n_warmup`` steps, then fall linearly to 0.
    """

    name: str
    n_experts: int
    n_active_experts: int
    mlp_size: int
    hidden_size: int = 128
    n_layers: int = 6
    n_heads: int = 4
    n_kv_heads: int = 2
    head_size: int = 32
    aux_loss: float = 0.01
    z_loss: float = 1e-3
    init_std: float = 0.05
    window: int = 512
    batch: int = 4
    n_steps: int = 300
    n_warmup: int = 20
    muon_lr: float = 0.02
    adam_lr: float = 8e-3
    router_lr: float = 1e-3
    adam_beta2: float = 0.98
    seed: int = 0


MOE = Recipe(name="moe", n_experts=16, n_active_experts=4, mlp_size=64)
DENSE = Recipe(name="dense", n_experts=0, n_active_experts=0, mlp_size=256)


def train(recipe: Recipe, corpus: str, on_step: Callable[[int, int, float], None]) -> PreTrainedModel:
    """Train one model from scratch.

    Runs on however many threads torch is set to; ``build_pair`` sets one, for speed and for weights
    that do not depend on the machine's core count.

    Args:
        recipe: what to train and how.
        corpus: training text.
        on_step: called after each step with (steps done, steps in all, cross-entropy in nats per byte).

    Returns:
        The model, in bfloat16 (the training itself is in fp32).
    """
    with _setup:
        import torch

        model = _fresh_model(recipe)
        ids_N = torch.tensor(byte_tokenizer(MAX_LENGTH)(corpus, verbose=False)["input_ids"])
    step_with = _optimizer(model, recipe)
    windows = torch.Generator().manual_seed(recipe.seed)
    for step in range(recipe.n_steps):
        loss = _backward(model, recipe, _batch(ids_N, recipe, windows))
        step_with(_schedule(step, recipe))
        model.zero_grad()
        on_step(step + 1, recipe.n_steps, loss)
    return model.eval().to(torch.bfloat16)


def _optimizer(model: PreTrainedModel, recipe: Recipe) -> Callable[[float], None]:
    """Muon for the matrices inside the layers, AdamW for embeddings, routers and norms.

    Returns:
        A function that makes one step at the given share of the peak learning rates.
    """
    import torch

    inner: list[torch.nn.Parameter] = []
    routers: list[torch.nn.Parameter] = []
    outer: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            routers.append(parameter)
        elif parameter.ndim == 1 or name.endswith("embed_tokens.weight"):
            outer.append(parameter)
        else:
            inner.append(parameter)
    muon = Muon(inner)
    groups = [{"params": outer, "peak": recipe.adam_lr}, {"params": routers, "peak": recipe.router_lr}]
    adam = torch.optim.AdamW(groups, betas=(0.9, recipe.adam_beta2), weight_decay=0.0, fused=True)

    def step_with(share: float) -> None:
        for group in adam.param_groups:
            group["lr"] = group["peak"] * share
        adam.step()
        muon.step(recipe.muon_lr * share)

    return step_with


def _backward(model: PreTrainedModel, recipe: Recipe, ids_BT: torch.Tensor) -> float:
    """Leaves the gradients in place and returns the cross-entropy without the auxiliary losses."""
    options = {"output_router_logits": True} if recipe.n_experts else {}
    out = model(input_ids=ids_BT, labels=ids_BT, use_cache=False, **options)
    (out.loss + recipe.z_loss * out.logits.logsumexp(-1).square().mean()).backward()
    balance = recipe.aux_loss * out.aux_loss.item() if recipe.n_experts else 0.0
    return float(out.loss.item()) - balance


def _batch(ids_N: torch.Tensor, recipe: Recipe, windows: torch.Generator) -> torch.Tensor:
    import torch

    starts_B = torch.randint(len(ids_N) - recipe.window + 1, (recipe.batch, 1), generator=windows)
    return ids_N[starts_B + torch.arange(recipe.window)]


def _schedule(step: int, recipe: Recipe) -> float:
    """Learning rate as a share of its peak, in (0, 1]."""
    warm_up = (step + 1) / max(1, recipe.n_warmup)
    decay = (recipe.n_steps - step) / max(1, recipe.n_steps - recipe.n_warmup)
    return min(1.0, warm_up, decay)


def _fresh_model(recipe: Recipe) -> PreTrainedModel:
    import torch
    from transformers import GenerationConfig, Qwen3ForCausalLM, Qwen3MoeForCausalLM

    # Initial weights come from torch's global generator; fork_rng leaves the caller's state as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model_class = Qwen3MoeForCausalLM if recipe.n_experts else Qwen3ForCausalLM
        model = model_class(_config(recipe))
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, eos_token_id=END_OF_TEXT_ID, pad_token_id=END_OF_TEXT_ID
    )
    return model.train()


def _config(recipe: Recipe) -> PreTrainedConfig:
    from transformers import Qwen3Config, Qwen3MoeConfig

    shared = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": recipe.hidden_size,
        "num_hidden_layers": recipe.n_layers,
        "num_attention_heads": recipe.n_heads,
        "num_key_value_heads": recipe.n_kv_heads,
        "head_dim": recipe.head_size,
        "initializer_range": recipe.init_std,
        "max_position_embeddings": MAX_LENGTH,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": END_OF_TEXT_ID,
    }
    if not recipe.n_experts:
        return Qwen3Config(intermediate_size=recipe.mlp_size, **shared)
    return Qwen3MoeConfig(
        intermediate_size=recipe.mlp_size * recipe.n_active_experts,
        moe_intermediate_size=recipe.mlp_size,
        num_experts=recipe.n_experts,
        num_experts_per_tok=recipe.n_active_experts,
        norm_topk_prob=True,
        router_aux_loss_coef=recipe.aux_loss,
        **shared,
    )
