"""One cell of gpu.py on torch's side: transformers and PEFT, on the rows that jtune's side has left.

    python gpu_torch.py CASE.json

It gets what is known to help: rows packed with a kernel for segments where torch has one, logits of labelled positions
only, a fused AdamW, adapters and optimizer in float32 and the rest in bfloat16, as on jtune's side; and, if the case
says so, Liger's kernels for norms, activations and rotary embeddings.
"""

import json
import sys
from inspect import signature
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AttentionInterface, AutoModelForCausalLM

OUT_OF_MEMORY = 9  # see measure.py
lengths: dict[str, torch.Tensor | int] = {}  # of the segments of the rows in hand, for `attend_segments`


def attend_segments(module, query, key, value, attention_mask, scaling=None, **_):
    """Attention within segments, by torch's kernel for sequences of different lengths laid end to end."""
    from torch.nn.attention.varlen import varlen_attn

    B, H, T, D = query.shape
    query, key = query.to(value.dtype), key.to(value.dtype)  # with float32 weights the rotation gives float32
    flat = lambda x: x.transpose(1, 2).reshape(B * T, -1, D)
    bounds, longest = lengths["bounds"], lengths["longest"]
    options = {"scale": scaling, "window_size": (-1, 0)}  # causal
    if "enable_gqa" in signature(varlen_attn).parameters:  # from torch 2.12 on
        options["enable_gqa"] = True
    else:
        key, value = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (key, value))
    out = varlen_attn(flat(query), flat(key), flat(value), bounds, bounds, longest, longest, **options)
    return out.reshape(B, T, -1, D), None


def set_lengths(segment_ids: torch.Tensor) -> None:
    """Where segments begin and end when the rows lie end to end. Padding is a segment."""
    B, T = segment_ids.shape
    new = torch.ones(B, T, dtype=torch.bool, device=segment_ids.device)
    new[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = new.flatten().nonzero().flatten().to(torch.int32)
    lengths["bounds"] = torch.cat([starts, torch.tensor([B * T], dtype=torch.int32, device=starts.device)])
    lengths["longest"] = int(lengths["bounds"].diff().max())


def mask_of(segment_ids: torch.Tensor) -> torch.Tensor:
    """bool [batch, 1, seq, seq]: causal, within segments."""
    T = segment_ids.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=segment_ids.device).tril()
    return ((segment_ids[:, :, None] == segment_ids[:, None, :]) & causal)[:, None]


def best_attention(device: str) -> str:
    """`segments` where torch's kernel is there and gives what its plain attention gives; else `sdpa` with a mask."""
    if device == "cpu":
        return "sdpa"
    try:
        q, k, v = (torch.randn(2, n, 64, 64, device=device, dtype=torch.bfloat16) for n in (4, 2, 2))
        segment_ids = torch.tensor([[1] * 40 + [2] * 24, [1] * 64], device=device)
        set_lengths(segment_ids)
        out, _ = attend_segments(None, q, k, v, None, scaling=0.125)
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        plain = functional.scaled_dot_product_attention(q, k, v, mask_of(segment_ids), scale=0.125)
        if (out.transpose(1, 2).float() - plain.float()).abs().max() < 0.05:
            AttentionInterface.register("segments", attend_segments)
            return "segments"
        print("torch's varlen_attn differs from its plain attention: not used")
    except (ImportError, RuntimeError, TypeError) as error:
        print(f"torch's varlen_attn cannot be used here: {error}")
    return "sdpa"


def use_liger(model: str) -> None:
    from liger_kernel.transformers import apply_liger_kernel_to_llama, apply_liger_kernel_to_qwen2

    apply = {"llama": apply_liger_kernel_to_llama, "qwen2": apply_liger_kernel_to_qwen2}
    kind = json.loads((Path(model) / "config.json").read_text())["model_type"]
    apply[kind](rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False)


def build(case: dict, device: str, attention: str):
    if case["liger"]:
        use_liger(case["model"])
    dtype = torch.float32 if device == "cpu" or case["method"] == "full" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(case["model"], dtype=dtype, attn_implementation=attention)
    model = model.to(device)
    if case["recompute"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if case["method"] == "lora":
        model = PeftModel.from_pretrained(model, case["adapter"], is_trainable=True)  # adapters in float32
    model.train()
    inner = model.get_base_model() if case["method"] == "lora" else model
    return inner, [p for p in model.parameters() if p.requires_grad]


def main(path: str) -> int:
    case = json.loads(Path(path).read_text())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    attention = best_attention(device)
    torch.manual_seed(0)
    try:
        model, trainable = build(case, device, attention)
        train(case, model, trainable, device, attention)
    except torch.cuda.OutOfMemoryError:
        return OUT_OF_MEMORY
    cuda = device == "cuda"
    found = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "attention": attention,
    }
    Path(case["result"]).write_text(json.dumps(found))
    return 0


def train(case: dict, model, trainable: list, device: str, attention: str) -> None:
    adam = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "fused": device == "cuda"}
    optimizer = torch.optim.AdamW(trainable, lr=case["learning_rate"], **adam)
    log = Path(case["output_dir"]) / "trainer_log.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    for step in range(case["updates"]):
        with np.load(Path(case["rows"]) / f"{step}.npz") as file:
            arrays = {key: torch.from_numpy(file[key]).to(device) for key in file}
        divisor = arrays.pop("divisor")
        # [accum, batch, seq] of jtune's side -> microbatches of this side
        rows = {key: x.flatten(0, 1).split(case["micro"]) for key, x in arrays.items()}
        total = 0.0
        for i in range(len(rows["input_ids"])):
            micro = {key: x[i] for key, x in rows.items()}
            loss = loss_sum(model, micro, device, attention) / divisor
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        line = {"current_steps": step + 1, "loss": float(total)}
        if device == "cuda":
            torch.cuda.synchronize()
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")


def loss_sum(model, micro: dict, device: str, attention: str) -> torch.Tensor:
    ids, segment_ids = micro["input_ids"].long(), micro["segment_ids"]
    set_lengths(segment_ids)
    mask = None if attention == "segments" else mask_of(segment_ids)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        hidden = model.model(
            input_ids=ids, position_ids=micro["positions"].long(), attention_mask=mask, use_cache=False
        )
        counts = micro["loss_weights"] > 0
        logits = model.lm_head(hidden.last_hidden_state[counts])
    return functional.cross_entropy(logits.float(), micro["targets"][counts].long(), reduction="sum")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
