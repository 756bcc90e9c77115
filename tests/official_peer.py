"""The official PyTorch code as a reference program of `mirai_jax.bench`: one step on request.

Not a test. It needs torch and clones of FoundationVision/LlamaGen and (for Mirai-E) y0urOy/Mirai-Code.
The benchmark starts it, so that both sides are timed interleaved on the same machine:

    python -m mirai_jax.bench --config=... --compare \
        --peer="python tests/official_peer.py --llamagen=FOLDER --mirai=FOLDER"

The benchmark adds the flags of sizes, dtype and device. Then each line on stdin is a task and each line on
stdout its answer, {"seconds": s} or {"error": ...}: `train llamagen` and `train mirai_e` are one step,
`sample` is one batch of whole sequences.

The steps are those of train_c2i.py and train_c2i_Mirai_E.py: autocast, loss, gradients, clipping, fused
AdamW, EMA, and for E the copy of the EMA into its teacher; sampling is `generate` of sample_c2i.py. On a
GPU both are compiled by torch.compile, as their scripts do (sampling with reduce-overhead).
"""

import argparse
import contextlib
import copy
import importlib.util
import json
import pathlib
import sys
import time

import torch

LEARNING_RATE, BETAS, DECAY, CLIP, EMA = 1e-4, (0.9, 0.95), 0.05, 1.0, 0.9999
OFFSETS = (0, 1, 16)
WARM_UP = 3


def load(path, name):
    """A module by its file: both clones have a package `autoregressive`."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def alignment_loss(teacher_BxTxD, student_BxTxD, offset):
    """Minus the mean cosine over the class position and the pairs `offset` apart, as the script's."""
    target = torch.cat([teacher_BxTxD[:, :1], teacher_BxTxD[:, 1 + offset :]], dim=1)
    length = target.shape[1] - 1
    student = torch.cat([student_BxTxD[:, :1], student_BxTxD[:, 1 : 1 + length]], dim=1)
    normalise = torch.nn.functional.normalize
    return -(normalise(target, dim=-1) * normalise(student, dim=-1)).sum(-1).mean()


class Training:
    """A model, its EMA and optimizer; `step` is one update."""

    def __init__(self, args, foresight):
        self.foresight, self.device = foresight, args.device
        self.dtype = getattr(torch, args.dtype)
        shapes = dict(
            vocab_size=args.vocab_size, block_size=args.grid**2, num_classes=args.num_classes,
            cls_token_num=1, model_type="c2i", resid_dropout_p=0.1, ffn_dropout_p=0.1,
            token_dropout_p=0.1,
        )  # fmt: skip
        if foresight:
            file = pathlib.Path(args.mirai, "autoregressive/models/Mirai.py")
            models = load(file, "official_mirai").GPT_models
            shapes.update(encoder_depth=args.tap, z_dims=[768], num_heads=len(OFFSETS))
        else:
            models = load(
                pathlib.Path(args.llamagen, "autoregressive/models/gpt.py"), "official_gpt"
            ).GPT_models
        torch.manual_seed(0)
        self.plain = models[f"GPT-{args.size}"](**shapes).to(self.device).train()
        self.ema = copy.deepcopy(self.plain).eval().requires_grad_(False)
        self.teacher = copy.deepcopy(self.ema) if foresight else None
        self.model = torch.compile(self.plain) if self.device == "cuda" else self.plain
        parameters = list(self.plain.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": DECAY},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)
        shape = (args.batch_size, args.grid**2)
        self.codes = torch.randint(args.vocab_size, shape, device=self.device)
        self.labels = torch.randint(args.num_classes, shape[:1], device=self.device)

    def step(self):
        inputs = dict(cond_idx=self.labels, idx=self.codes[:, :-1])
        autocast = contextlib.nullcontext()
        if self.dtype != torch.float32:
            autocast = torch.autocast(self.device, dtype=self.dtype)
        with autocast:
            outputs = self.model(**inputs, targets=self.codes)
        loss = outputs[-1]
        if self.foresight:
            with torch.no_grad():
                teacher = self.teacher.forward_ema(**inputs, targets=None)
            for offset, student in zip(OFFSETS, outputs[1], strict=True):
                loss = loss + 2.0 * alignment_loss(teacher, student, offset)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.plain.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for average, parameter in zip(
                self.ema.parameters(), self.plain.parameters(), strict=True
            ):
                average.mul_(EMA).add_(parameter.data, alpha=1 - EMA)
        if self.teacher is not None:
            self.teacher.load_state_dict(self.ema.state_dict())
        return loss.item()


class Sampling:
    """The official sampler on a fresh model."""

    def __init__(self, args):
        sys.path.insert(0, args.llamagen)
        self.generate = load(
            pathlib.Path(args.llamagen, "autoregressive/models/generate.py"), "official_generate"
        ).generate
        models = load(pathlib.Path(args.llamagen, "autoregressive/models/gpt.py"), "official_gpt")
        self.length, self.guidance = args.grid**2, args.guidance
        self.model = models.GPT_models[f"GPT-{args.size}"](
            vocab_size=args.vocab_size, block_size=self.length, num_classes=args.num_classes,
            cls_token_num=1, model_type="c2i",
        ).to(device=args.device, dtype=getattr(torch, args.dtype)).eval()  # fmt: skip
        torch.nn.init.normal_(self.model.output.weight, std=0.02)  # zero: all tokens alike
        if args.device == "cuda":
            self.model = torch.compile(self.model, mode="reduce-overhead", fullgraph=True)
        self.labels = torch.randint(args.num_classes, (args.sample_batch,), device=args.device)

    def step(self):
        sampling = dict(temperature=1.0, top_k=0, top_p=1.0, sample_logits=True)
        self.generate(self.model, self.labels, self.length, cfg_scale=self.guidance, **sampling)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llamagen", required=True)
    parser.add_argument("--mirai", default="")
    parser.add_argument("--size", default="B")
    parser.add_argument("--tap", type=int, default=8)
    parser.add_argument("--grid", type=int, default=16)
    parser.add_argument("--vocab_size", type=int, default=16384)
    parser.add_argument("--num_classes", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sample_batch", type=int, default=1)
    parser.add_argument("--guidance", type=float, default=2.0)
    args = parser.parse_args()
    answers = sys.stdout
    sys.stdout = sys.stderr  # the official code prints
    if args.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    sys.path.insert(0, args.llamagen)
    make = {
        "train llamagen": lambda: Training(args, foresight=False),
        "train mirai_e": lambda: Training(args, foresight=True),
        "sample": lambda: Sampling(args),
    }
    made = {}

    def wait():
        if args.device == "cuda":
            torch.cuda.synchronize()

    for line in sys.stdin:
        try:
            task = line.strip()
            if task not in made:
                made[task] = make[task]()
                for _ in range(WARM_UP if args.device == "cuda" else 1):
                    made[task].step()
            wait()
            start = time.perf_counter()
            made[task].step()
            wait()
            answer = {"seconds": time.perf_counter() - start}
        except Exception as error:  # the benchmark shows it in one line
            message = (str(error).splitlines() or [""])[0]
            answer = {"error": f"{type(error).__name__}: {message}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
