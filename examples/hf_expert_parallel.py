"""Spread the experts of a Hugging Face model over processes, and let it generate.

    torchrun --nproc-per-node 4 examples/hf_expert_parallel.py
    torchrun --nproc-per-node 2 examples/hf_expert_parallel.py --family Qwen3Moe --experts 16 --top-k 4
    python examples/hf_expert_parallel.py                       # one process

Needs transformers (`pip install 'moecomm[hf]'`), and no download: the model is a small one with random weights, the
same on every rank, as if all had loaded one checkpoint. Each rank then keeps its own experts, continues a prompt of its
own, and compares what comes out with the whole model: the tokens, the logits, and the bytes that the experts take.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

import moecomm
from moecomm.integrations.transformers import expert_parallel

BOUND = 1e-5


def main(argv: Sequence[str] | None = None) -> int:
    """Build, spread, generate, compare; the exit status."""
    args = parse_args(argv)
    with joined_group():
        try:
            return run(args)
        except (moecomm.MoECommError, AttributeError, ImportError) as error:  # no such family, no transformers
            print(f"hf_expert_parallel: {error}", file=sys.stderr)
            return 2


def run(args: argparse.Namespace) -> int:
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    whole = build(args)
    model = expert_parallel(copy.deepcopy(whole))

    generator = torch.Generator().manual_seed(args.seed + rank)
    prompt = torch.randint(3, args.vocabulary, (1, args.prompt), generator=generator)
    options = {"max_new_tokens": args.new_tokens, "do_sample": False}
    text, expected = model.generate(prompt, **options), whole.generate(prompt, **options)
    with torch.no_grad():
        logits, exact = model(text).logits, whole(text).logits
    error = float((logits - exact).abs().max() / exact.abs().max())
    held, all_held = expert_bytes(model), expert_bytes(whole)
    # A rank whose text has ended goes on with padding until the others are done.
    right = torch.equal(text[:, : expected.shape[1]], expected) and error <= BOUND

    said = f"rank {rank}: {text[0, args.prompt :].tolist()}; experts {held / 1e6:.2f} of {all_held / 1e6:.2f} MB"
    said += f"; logits within {error:.1g} of the whole model" if right else f"; WRONG: {expected[0].tolist()}, {error}"
    every = [said]
    if num_ranks > 1:
        every = [""] * num_ranks
        dist.all_gather_object(every, said)
    if rank == 0:
        print(f"{type(whole).__name__}: {args.experts} experts in each of {args.layers} layers on {num_ranks} rank(s)")
        print("\n".join(every))
    return 1 if any("WRONG" in line for line in every) else 0


def build(args: argparse.Namespace) -> Any:
    """A model of the family with random weights."""
    import transformers

    config = getattr(transformers, f"{args.family}Config")(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        moe_intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=args.hidden // 4,
        num_local_experts=args.experts,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(args.seed)
    return getattr(transformers, f"{args.family}ForCausalLM")(config).eval()


def expert_bytes(model: torch.nn.Module) -> int:
    return sum(p.untyped_storage().nbytes() for name, p in model.named_parameters() if ".experts." in name)


@contextmanager
def joined_group() -> Iterator[None]:
    """The process group of torchrun, if it started us; one that is there already is used."""
    join = dist.is_torchelastic_launched() and not dist.is_initialized()
    if join:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        if join:
            dist.destroy_process_group()


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="Mixtral", help="as transformers spells it: Mixtral, Qwen3Moe, Olmoe")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--intermediate", type=int, default=128, help="of each expert")
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=8, help="tokens of it")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
