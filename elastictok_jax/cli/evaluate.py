"""Measure the paper's figures and tables on held-out clips; run again to resume."""

import argparse

from elastictok_jax.cli.options import INPUT, LOCAL, LOCAL_TEXT, print_if_json_option

EPILOG = "without --data, the clips are those that MODEL's own sources hold out"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=LOCAL_TEXT, help="a training workdir or an exported folder")
    parser.add_argument(
        "--baseline",
        action="append",
        type=LOCAL_TEXT,
        default=[],
        metavar="MODEL",
        help="another model to compare with, such as a fixed tokenizer; may be given several times",
    )
    parser.add_argument("--data", type=INPUT, help="a folder, file, glob or data set to measure on")
    parser.add_argument(
        "--fps",
        type=float,
        metavar="F",
        help="frames per second to measure at, 0 for all (default: as MODEL's sources in training)",
    )
    parser.add_argument(
        "--targets", metavar="X,...", help="MSE on the [-1, 1] scale, e.g. 0.003,0.015"
    )
    parser.add_argument(
        "--max-clips",
        type=int,
        metavar="N",
        help="maximum of videos, and of images, per source",
    )
    parser.add_argument("--max-blocks", type=int, metavar="N", help="maximum of blocks per clip")
    parser.add_argument(
        "--search-blocks",
        type=int,
        metavar="N",
        help="blocks per clip that every search codes, also `full`, which tries all lengths: slow",
    )
    parser.add_argument("-o", "--output", type=LOCAL, required=True, help="folder for the report")
    parser.add_argument("--json", action="store_true", help="print metrics.json")


def run(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from elastictok_jax.evaluation.eval_clips import EvaluationOverrides
    from elastictok_jax.evaluation.evaluate import evaluate_models

    limits = EvaluationOverrides(args.targets, args.max_clips, args.max_blocks, args.search_blocks)
    models = [args.model, *args.baseline]
    results = evaluate_models(
        models, output=args.output, data=args.data, fps=args.fps, limits=limits
    )
    print_if_json_option(results, args)
