"""The `infer` command line. Nothing heavy is imported here, so that `infer --help` starts at once."""

import argparse

from subquad.arguments import Parser


def main(argv: list[str]) -> int:
    """Run `infer ARGUMENTS`; returns 0, or 130 where it was interrupted. Bad input raises UserError."""
    arguments = parser().parse_args(argv)
    from subquad.infer.run import run

    return run(arguments)


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="infer",
        description="Continue text with a trained model. The text goes to stdout as it comes, all else to stderr.",
        epilog="Ctrl-C stops between two tokens, keeps the text and saves the state where --save-state asks for it.",
    )
    p.add_argument("--model", required=True, metavar="DIR", help="folder of a model saved by subquad")
    p.add_argument("--prompt", metavar="TEXT", help="text to continue")
    p.add_argument("--prompt-file", metavar="F", help="file with the text; with neither, stdin is read")
    p.add_argument("--special-tokens", action="store_true", help="let a prompt that spells a special token become it")
    p.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="the most tokens to generate (256)")

    sampling = p.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token, the default")
    sampling.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    sampling.add_argument("--top-p", type=float, metavar="P", help="draw from the smallest set of probability P")
    sampling.add_argument("--min-p", type=float, metavar="P", help="leave out tokens below P times the likeliest one")
    sampling.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1, repeats are less likely")
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="end before this text (may be given again)")
    sampling.add_argument("--seed", type=int, help="the same seed gives the same text")
    sampling.add_argument(
        "--num-samples", type=int, default=1, metavar="N", help="texts from one reading of the prompt"
    )

    state = p.add_argument_group("state")
    state.add_argument("--save-state", metavar="F", help="write where the model stands at the end, to go on from later")
    state.add_argument("--load-state", metavar="F", help="go on from there, with more prompt or without")
    state.add_argument("--overwrite", action="store_true", help="let --save-state and --stats replace files")

    running = p.add_argument_group("running")
    running.add_argument("--prefill-chunk", type=int, default=4096, metavar="N", help="prompt tokens a call (4096)")
    running.add_argument("--trust-code", action="store_true", help="let what lies in a model's folder import classes")
    running.add_argument("--dtype", help="float32, bfloat16, float16 or float64; float32 by default")
    running.add_argument("--device", help="cpu, cuda, cuda:1, mps; by default the first GPU, else cpu")
    running.add_argument("--stats", metavar="F", help="write speeds, state bytes and peak memory as JSON")
    return p
