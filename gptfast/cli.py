"""The command line: ``gptfast demo | generate | score | train | predict | bench | explain | warmup | env``."""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import __version__
from .config import OpenAIGPTConfig
from .explain import explain
from .heads import OpenAIGPTLMHeadModel
from .linear import quantize
from .scoring import score_ids
from .tokenizer import OpenAIGPTTokenizer

SHIPPED = Path(__file__).parent / "shipped"  # the small model that comes with the package
DEMO_PROMPT = "It was a dark and stormy night, and the captain"
TASKS = ("language-modeling", "classification", "entailment", "similarity", "multiple-choice")
KINDS = ("none", "ddp", "fsdp", "tensor")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# -- loading --------------------------------------------------------------------------------------------------------


def _device(args: argparse.Namespace) -> torch.device:
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {args.device}: this PyTorch sees {torch.cuda.device_count()} GPUs")
    return device


def _load(args: argparse.Namespace) -> tuple[OpenAIGPTLMHeadModel, OpenAIGPTTokenizer]:
    device = _device(args)
    name = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if name == "int8" and device.type != "cpu":
        raise ValueError(f"--dtype int8 is for --device cpu, got {device}")
    dtype = torch.float32 if name == "int8" else DTYPES[name]
    model = OpenAIGPTLMHeadModel.from_pretrained(args.model, dtype=dtype).to(device)
    if name == "int8":
        quantize(model)
    return model, OpenAIGPTTokenizer.from_pretrained(args.model)


def _encode(tokenizer: OpenAIGPTTokenizer, text: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))


def _read(file: str) -> str:
    try:  # bytes, so that what is counted is what the file holds
        return (sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error


# -- generate -------------------------------------------------------------------------------------------------------


def _stream(
    model: OpenAIGPTLMHeadModel, tokenizer: OpenAIGPTTokenizer, prompt: str, echo: bool, **settings: Any
) -> dict[str, Any]:
    """Continues a prompt, printing as it goes if ``echo``; returns what was made and how fast."""
    ids = _encode(tokenizer, prompt)
    if not ids:
        raise ValueError(f"--prompt must hold at least one token, got {prompt!r}")
    new: list[int] = []
    steps = model.generate_stream(torch.tensor([ids], device=model.device), **settings)  # refuses before it starts
    if echo:
        print(tokenizer.decode(ids), end=" ", flush=True)
    started = first = time.perf_counter()
    for tokens in steps:
        new.append(int(tokens))
        first = time.perf_counter() if len(new) == 1 else first
        if echo:
            token = tokenizer.convert_ids_to_tokens(new[-1])
            print("\n" if token == "\n</w>" else token.replace("</w>", " "), end="", flush=True)
    ended = time.perf_counter()
    if echo:
        print()
    return {
        "prompt": prompt,
        "prompt_tokens": len(ids),
        "text": tokenizer.decode(ids + new),
        "new_tokens": len(new),
        "first_token_ms": 1e3 * (first - started),
        "tokens_per_second": (len(new) - 1) / (ended - first) if len(new) > 1 else None,
    }


def generate(args: argparse.Namespace) -> None:
    model, tokenizer = _load(args)
    prompt = args.prompt if args.prompt_file is None else _read(args.prompt_file)
    result = _stream(
        model,
        tokenizer,
        prompt,
        echo=not args.json,
        max_new_tokens=args.max_new_tokens,
        do_sample=not args.greedy,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        overflow=args.overflow,
        seed=args.seed,
        eos_token_id=_stop_ids(tokenizer, args.stop),
    )
    if args.json:
        print(json.dumps(result))
    else:
        print(_speed(result), file=sys.stderr)


def _stop_ids(tokenizer: OpenAIGPTTokenizer, stops: Sequence[str]) -> list[int]:
    ids = [_encode(tokenizer, stop) for stop in stops]
    for stop, tokens in zip(stops, ids, strict=True):
        if len(tokens) != 1:
            raise ValueError(f"--stop must be one token of the vocabulary, {stop!r} is {len(tokens)}")
    return [tokens[0] for tokens in ids]


def _speed(result: dict[str, Any]) -> str:
    rate = result["tokens_per_second"]
    return f"[{result['new_tokens']} tokens, first after {result['first_token_ms']:.0f} ms" + (
        f", then {rate:.0f} tokens/s]" if rate else "]"
    )


# -- score ----------------------------------------------------------------------------------------------------------


def score(args: argparse.Namespace) -> None:
    text = _read(args.file)
    model, tokenizer = _load(args)
    ids = torch.tensor(_encode(tokenizer, text))
    if len(ids) < 2:
        raise ValueError(f"{args.file} has {len(ids)} tokens, at least 2 are needed")
    started = time.perf_counter()
    with tqdm(total=len(ids) - 1, unit="token", desc="scoring", disable=args.json, delay=0.5) as bar:
        result = score_ids(
            model,
            ids,
            context=args.context,
            stride=args.stride,
            batch_size=args.batch_size,
            text_bytes=len(text.encode()),
            progress=bar.update,
        )
    seconds = time.perf_counter() - started
    row = {
        "file": args.file,
        "tokens": result.tokens,
        "bytes": result.bytes,
        "nll_per_token": result.nll / result.tokens,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "tokens_per_second": result.tokens / seconds,
    }
    if args.json:
        print(json.dumps(row))
    else:
        print(
            f"{args.file}: perplexity {result.perplexity:.2f} a token, {result.bits_per_byte:.3f} bits a byte "
            f"({result.tokens:,} tokens, {result.bytes:,} bytes, {seconds:.1f} s)"
        )


# -- train and predict ----------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> None:
    from .training import Options, plot_log, start

    options = Options(
        resume=args.resume,
        save_every=500 if args.save_every is None else args.save_every,
        evaluate_every=500 if args.evaluate_every is None else args.evaluate_every,
        log_every=args.log_every,
        progress=not args.json,
        checkpoint_activations=args.checkpoint_activations,
        cuda_graph=args.cuda_graph,
    )
    parallel, device = start(args.parallel, _device(args))
    args.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    run = _train_on_text if args.task is None else _fine_tune
    row = {"output": args.output, **run(args, options, parallel, device)}
    if not parallel.is_main:
        return
    if importlib.util.find_spec("matplotlib") is not None:
        row["loss_curve"] = str(plot_log(args.output))
    if args.json:
        print(json.dumps(row))
    else:
        names = {name: name.replace("held_out_", "held-out ").replace("_", " ") for name in row}
        shown = ", ".join(f"{names[k]} {value:.4g}" for k, value in row.items() if isinstance(value, float))
        print(f"{args.output}: {shown or 'done'}")


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """Those of the run's settings that are on the command line."""
    from .training import Settings

    names = [field.name for field in dataclasses.fields(Settings)]
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def _train_on_text(args: argparse.Namespace, options: Any, parallel: Any, device: torch.device) -> dict[str, Any]:
    from .tokenizer import train_tokenizer
    from .training import Settings, check_output, is_unfinished, read_texts, split_held_out
    from .training import train as run

    for name in ("columns", "labels", "valid", "epochs", "regression", "padded"):
        if getattr(args, name):
            raise ValueError(f"--{name} goes with --task")
    if args.steps is None:
        raise ValueError("--steps is needed to train on plain text")
    settings = Settings(**_given(args))
    texts, output = read_texts(args.files), Path(args.output)
    check_output(output, args.resume)

    torch.manual_seed(settings.seed)
    if args.model is not None:
        tokenizer = OpenAIGPTTokenizer.from_pretrained(args.model)
        dropout = {"resid_pdrop": args.dropout, "embd_pdrop": args.dropout, "attn_pdrop": args.attention_dropout}
        given = {name: p for name, p in dropout.items() if p is not None}
        config = OpenAIGPTConfig.from_pretrained(args.model, **given)
        model = OpenAIGPTLMHeadModel.from_pretrained(args.model, config=config, dtype=torch.float32)
    else:
        config = OpenAIGPTConfig(
            vocab_size=args.vocab_size,
            n_positions=settings.context if args.n_positions is None else args.n_positions,
            n_embd=args.n_embd,
            n_layer=args.n_layer,
            n_head=args.n_head,
            resid_pdrop=args.dropout or 0.0,
            embd_pdrop=args.dropout or 0.0,
            attn_pdrop=args.attention_dropout or 0.0,
            initializer_range=args.initializer_range,
        )
        if config.n_embd % config.n_head:
            raise ValueError(f"--n-embd must be a multiple of --n-head, got {config.n_embd} and {config.n_head}")
        if config.n_positions < settings.context:
            raise ValueError(f"--n-positions must be at least --context = {settings.context}, got {config.n_positions}")
        if parallel.is_main and not is_unfinished(output):
            print(f"learning a vocabulary of {args.vocab_size} from {len(texts)} files …", file=sys.stderr)
            tokenizer = train_tokenizer([split_held_out(text, settings.held_out)[0] for text in texts], args.vocab_size)
            output.mkdir(parents=True, exist_ok=True)
            tokenizer.save_pretrained(output)
        parallel.barrier()
        tokenizer = OpenAIGPTTokenizer.from_pretrained(output)
        config.vocab_size = len(tokenizer)
        model = OpenAIGPTLMHeadModel(config)
    model.to(device)
    if parallel.is_main:
        print(f"{model.num_parameters():,} parameters on {model.device}", file=sys.stderr)
    _, held_out = run(model, tokenizer, texts, settings, output, options=options, parallel=parallel)
    return {
        "steps": settings.steps,
        "held_out_perplexity": held_out and held_out.perplexity,
        "held_out_bits_per_byte": held_out and held_out.bits_per_byte,
    }


def _fine_tune(args: argparse.Namespace, options: Any, parallel: Any, device: torch.device) -> dict[str, Any]:
    from .training import Task, check_output, fine_tune, fine_tuning_settings, load_for_task, read_examples

    for name in ("steps", "held_out"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} goes with plain text; --task has --epochs and --valid")
    check_output(args.output, args.resume)
    task = Task(args.task, _columns(args.columns), tuple(args.labels), args.regression).with_labels_of(*args.files)
    torch.manual_seed(args.seed or 0)
    dropout = 0.1 if args.dropout is None else args.dropout
    attention_dropout = 0.1 if args.attention_dropout is None else args.attention_dropout
    model, tokenizer = load_for_task(args.model or SHIPPED, task, dropout=dropout, attention_dropout=attention_dropout)
    context = model.config.n_positions if args.context is None else args.context
    examples = [example for file in args.files for example in read_examples(file, task, tokenizer, context)]
    held_out = read_examples(args.valid, task, tokenizer, context) if args.valid else []
    given = {**_given(args), "context": context}
    given.setdefault("batch_size", min(32, len(examples)))
    settings = fine_tuning_settings(len(examples), epochs=3 if args.epochs is None else args.epochs, **given)
    epoch = len(examples) // settings.batch_size
    for name in ("save_every", "evaluate_every"):
        if getattr(args, name) is None:
            options = dataclasses.replace(options, **{name: epoch})
    if parallel.is_main:
        cut = sum(example.cut for example in examples)
        print(
            f"{len(examples):,} examples ({cut:,} cut to {context} tokens), {settings.steps:,} steps; "
            f"{model.num_parameters():,} parameters on {device}",
            file=sys.stderr,
        )
    _, results = fine_tune(
        model.to(device),
        tokenizer,
        task,
        examples,
        settings,
        args.output,
        held_out=held_out,
        packed=not args.padded,
        options=options,
        parallel=parallel,
    )
    return {"steps": settings.steps, "examples": len(examples), **results}


def _columns(pairs: Sequence[str]) -> dict[str, list[str]]:
    """["choice=a", "choice=b"] as {"choice": ["a", "b"]}."""
    columns: dict[str, list[str]] = {}
    for pair in pairs:
        role, equals, name = pair.partition("=")
        if not (role and equals and name):
            raise ValueError(f"--columns must be ROLE=COLUMN, got {pair!r}")
        columns.setdefault(role, []).append(name)
    return columns


def predict_command(args: argparse.Namespace) -> None:
    from .training import predict_file

    rows = predict_file(args.model, args.file, device=_device(args), batch_size=args.batch_size)
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(open(args.output, "w", encoding="utf-8")) if args.output else sys.stdout
        for row in tqdm(rows, unit="example", desc="predicting", disable=not args.output):
            print(json.dumps(row, ensure_ascii=False), file=out)


# -- bench ----------------------------------------------------------------------------------------------------------


def bench(args: argparse.Namespace) -> None:
    from gptfast_bench import cli  # the suite imports this package: only this command imports it

    args.device = str(_device(args))
    cli.run(args)


def bench_compare(args: argparse.Namespace) -> None:
    from gptfast_bench import cli

    sys.exit(cli.compare_files(args.before, args.after, as_json=args.json))


def _bench_arguments(sub: argparse.ArgumentParser) -> None:
    which = sub.add_mutually_exclusive_group()
    profiles = ("full", "quick", "inference", "smoke")
    which.add_argument("--profile", choices=profiles, default="full", help="ten minutes, two, thirty, and a toy's")
    which.add_argument("--quick", action="store_const", dest="profile", const="quick", help="as --profile quick")
    sub.add_argument("--device", help="cpu, cuda, cuda:1, …; a GPU if there is one")
    sub.add_argument("--threads", type=int, help="on a CPU; as many as torch takes if not given")
    sub.add_argument("--op", action="append", default=[], help="attention, …, model; may be repeated")
    sub.add_argument("--mode", action="append", default=[], help="forward, decode, …; may be repeated")
    sub.add_argument("--dtype", action="append", default=[], choices=DTYPES, help="in place of the profile's")
    sub.add_argument(
        "--baseline",
        action="append",
        default=[],
        metavar="PROVIDER",
        help="run these beside gptfast, the first to hold the others against; all if not given",
    )
    sub.add_argument("--output-dir", default="runs/bench", metavar="FOLDER", help="for bench.json, .csv and .html")
    sub.add_argument(
        "--resume", nargs="?", const=True, metavar="FILE", help="go on with this bench.json; the folder's if not named"
    )
    sub.add_argument("--first", type=int, default=0, metavar="N", help="leave out the first N cells")
    sub.add_argument("--seconds", type=float, metavar="S", help="start no cell after these; as the profile has it")
    sub.add_argument("--no-progress", action="store_true", help="no progress bar")
    out = sub.add_mutually_exclusive_group()
    out.add_argument("--json", action="store_true", help="print the report as JSON")
    out.add_argument("--csv", action="store_true", help="print the report as CSV")
    other = sub.add_subparsers(metavar="compare")
    help = "What got slower between two runs, beyond noise; the exit status is 1 if anything did."
    sub = other.add_parser("compare", help=help, description=help)
    sub.add_argument("before", metavar="BEFORE.json")
    sub.add_argument("after", metavar="AFTER.json")
    sub.add_argument("--json", action="store_true", help="print a JSON list")
    sub.set_defaults(run=bench_compare)


# -- explain and env ------------------------------------------------------------------------------------------------


def explain_command(args: argparse.Namespace) -> None:
    model, _ = _load(args)
    rows = explain(model, _random_ids(model, args.batch_size, args.length), strict=args.strict)
    print(json.dumps([dataclasses.asdict(row) for row in rows]) if args.json else rows)


def _random_ids(model: OpenAIGPTLMHeadModel, B: int, T: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(0)).to(model.device)


def env(args: argparse.Namespace) -> None:
    rows: dict[str, Any] = {
        "gptfast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cpu_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    for package in ("triton", "transformers", "tokenizers", "safetensors", "ftfy", "spacy", "h5py"):
        found = importlib.util.find_spec(package) is not None
        rows[package] = importlib.metadata.version(package) if found else None
    rows["cuda"] = torch.version.cuda
    rows["gpus"] = [
        f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}"
        for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    rows["shipped_model"] = (SHIPPED / "config.json").exists()
    if args.json:
        print(json.dumps(rows))
    else:
        for name, value in rows.items():
            value = ", ".join(value) or "none" if isinstance(value, list) else value
            print(f"{name:16} {'not installed' if value is None else value}")


# -- warmup ---------------------------------------------------------------------------------------------------------


def warmup_command(args: argparse.Namespace) -> None:
    from .warmup import warmup

    model, _ = _load(args)
    rows = warmup(model, args.batch_size, progress=lambda calls: tqdm(calls, desc="warming up", disable=args.json))
    if args.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows]))
        return
    print(f"{'call':32}{'first':>10}{'again':>10}")
    for row in rows:
        print(f"{row.call:32}{1e3 * row.first:8.1f} ms{1e3 * row.again:7.1f} ms")


# -- demo -----------------------------------------------------------------------------------------------------------


def demo(args: argparse.Namespace) -> None:
    from gptfast_kernels import use_backend

    model, tokenizer = _load(args)
    c = model.config
    print(
        f"GPT-1, {c.n_layer} layers, width {c.n_embd}, {c.n_head} heads, vocabulary {c.vocab_size:,}: "
        f"{model.num_parameters():,} parameters, {str(model.dtype).removeprefix('torch.')} on {model.device}\n"
    )
    ids = _random_ids(model, 4, c.n_positions)
    print(explain(model, ids))

    def forward(backend: str) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with use_backend(backend), torch.inference_mode():
                logits = model(ids).logits
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            return logits

        return run

    fast, reference = forward("auto"), forward("reference")
    exact = _double(model, ids)
    errors = [float((run().double() - exact).abs().max()) for run in (fast, reference)]
    print(
        f"\nlargest error of {exact.numel():,} logits (largest: {float(exact.abs().max()):.1f}) "
        f"against the reference in float64: {errors[0]:.1e}; the unfused reference itself errs by {errors[1]:.1e}"
    )
    times = _interleaved_medians([fast, reference], args.rounds)
    print(
        f"forward pass of {ids.shape[0]} x {ids.shape[1]} tokens, median of {args.rounds} interleaved rounds: "
        f"{1e3 * times[0]:.1f} ms, unfused reference {1e3 * times[1]:.1f} ms: {times[1] / times[0]:.2f} times as fast\n"
    )
    result = _stream(
        model,
        tokenizer,
        args.prompt,
        echo=True,
        max_new_tokens=args.max_new_tokens,
        do_sample=True,
        temperature=0.8,
        top_k=40,
        seed=args.seed,
    )
    print(_speed(result))
    if args.save is not None:
        figures = {
            "device": torch.cuda.get_device_name(model.device)
            if model.device.type == "cuda"
            else f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}",
            "threads": torch.get_num_threads(),
            "versions": {"gptfast": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "dtype": str(model.dtype),
            "shape": list(ids.shape),
            "rounds": args.rounds,
            "forward_ms": 1e3 * times[0],
            "reference_ms": 1e3 * times[1],
            "error": errors[0],
            "reference_error": errors[1],
            "generation": result,
        }
        Path(args.save).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _double(model: OpenAIGPTLMHeadModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits by the formulas in float64: the oracle."""
    from gptfast_kernels import use_backend

    oracle = OpenAIGPTLMHeadModel(model.config).to(ids.device, torch.float64).eval()
    oracle.load_state_dict(model.state_dict())
    with use_backend("reference"), torch.inference_mode():
        return oracle(ids).logits


def _interleaved_medians(runs: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Seconds, one call of each a round, so that a slow spell of the machine hits all of them."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, times in zip(runs, seconds, strict=True):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in seconds]


# -- arguments ------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("gptfast", description="GPT-1 on fused kernels.")
    parser.add_argument("--version", action="version", version=f"gptfast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(
        name: str, run: Callable, help: str, *, model: bool = True, int8: bool = False
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=help, description=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.set_defaults(run=run)
        if model:
            sub.add_argument("--model", default=str(SHIPPED), help="a folder or a Hub name", metavar="NAME")
            sub.add_argument("--device", help="cpu, cuda, cuda:1, …; a GPU if there is one")
            choices = (*DTYPES, "int8") if int8 else tuple(DTYPES)
            sub.add_argument("--dtype", choices=choices, help="bfloat16 on a GPU, float32 on a CPU")
        return sub

    sub = command("demo", demo, "Check, time and listen to the small model that ships with the package.")
    sub.add_argument("--prompt", default=DEMO_PROMPT)
    sub.add_argument("--max-new-tokens", type=int, default=120)
    sub.add_argument("--rounds", type=int, default=10, help="of the timing")
    sub.add_argument("--save", metavar="FILE", help="write the figures as JSON too")
    sub.add_argument("--seed", type=int, default=0)

    sub = command("generate", generate, "Continue a prompt.", int8=True)
    prompt = sub.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt")
    prompt.add_argument("--prompt-file", metavar="FILE", help="- reads standard input")
    sub.add_argument("--max-new-tokens", type=int, default=100)
    sub.add_argument("--greedy", action="store_true", help="take the likeliest token, do not sample")
    sub.add_argument("--temperature", type=float, default=0.8)
    sub.add_argument("--top-k", type=int, default=40, help="0: all")
    sub.add_argument("--top-p", type=float, default=1.0)
    sub.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: against repetition")
    sub.add_argument(
        "--overflow",
        choices=("error", "slide"),
        default="error",
        help="at the model's last position: refuse, or go on behind the last half of the window",
    )
    sub.add_argument("--seed", type=int, help="makes the sampling repeatable")
    sub.add_argument("--stop", action="append", default=[], metavar="TOKEN", help="ends the text; may be repeated")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command("score", score, "Perplexity and bits per byte of a text.", int8=True)
    sub.add_argument("file", help="- reads standard input")
    sub.add_argument("--context", type=int, help="tokens a window; the model's n_positions if not given")
    sub.add_argument("--stride", type=int, help="tokens between windows; half the context if not given")
    sub.add_argument("--batch-size", type=int, default=8, help="windows a forward pass")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command("train", train, "Train a language model on text files, or fine-tune one for a task.", model=False)
    sub.add_argument("files", nargs="+", metavar="FILE", help="UTF-8 text; with --task TSV, CSV or JSON lines")
    sub.add_argument("--output", required=True, metavar="FOLDER")
    sub.add_argument("--model", help="a folder or Hub name to go on from", metavar="NAME")
    sub.add_argument("--device", help="cpu, cuda, cuda:1, …; a GPU if there is one")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the matmuls; bfloat16 on a GPU")
    sub.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    sub.add_argument("--steps", type=int, help="on plain text")
    sub.add_argument("--batch-size", type=int, help="over all devices; 4, with --task 32")
    sub.add_argument("--accumulate", type=int, default=1, help="parts a batch is cut into")
    sub.add_argument("--context", type=int, help="tokens a sequence; 512, with --task the model's n_positions")
    sub.add_argument("--learning-rate", type=float, help="1e-3, with --task 6.25e-5")
    sub.add_argument("--schedule", choices=("cosine", "linear"), help="behind the warm-up; with --task linear")
    sub.add_argument("--warmup-steps", type=int, help="100, with --task 0.2 %% of all")
    sub.add_argument("--weight-decay", type=float, help="0.1, with --task 0.01")
    sub.add_argument("--beta1", type=float, default=0.9)
    sub.add_argument("--beta2", type=float, help="0.95, with --task 0.999")
    sub.add_argument("--clip-norm", type=float, default=1.0)
    sub.add_argument("--held-out", type=float, help="fraction of each text file, its end; 0.05")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--dropout", type=float, help="0, with --task 0.1")
    sub.add_argument("--attention-dropout", type=float, help="as --dropout; 0 keeps a CPU on its fused attention")
    sub.add_argument("--save-every", type=int, help="steps; 500, with --task an epoch")
    sub.add_argument("--evaluate-every", type=int, help="steps; 500, with --task an epoch")
    sub.add_argument("--log-every", type=int, default=50, help="steps")
    sub.add_argument("--parallel", choices=KINDS, help="under torchrun; ddp if not given")
    sub.add_argument("--checkpoint-activations", action="store_true", help="a fraction of the memory, more time")
    sub.add_argument("--cuda-graph", action="store_true", help="record a step once and replay it, on one GPU")
    sub.add_argument("--json", action="store_true", help="print one JSON object, no progress bar")
    task = sub.add_argument_group("fine-tuning")
    task.add_argument("--task", choices=TASKS)
    task.add_argument("--columns", nargs="+", default=[], metavar="ROLE=COLUMN", help="text=review label=stars")
    task.add_argument("--labels", nargs="+", default=[], help="in their order; those of the files if not given")
    task.add_argument("--regression", action="store_true", help="the label is a number to predict")
    task.add_argument("--valid", metavar="FILE", help="examples to judge the model on")
    task.add_argument("--epochs", type=int, help="3 if not given")
    task.add_argument("--lm-coef", type=float, default=0.5, help="weight of the language-model loss")
    task.add_argument("--classifier-dropout", type=float, default=0.1)
    task.add_argument("--padded", action="store_true", help="pad sequences instead of packing them")
    new = sub.add_argument_group("a new model")
    new.add_argument("--vocab-size", type=int, default=4096)
    new.add_argument("--n-positions", type=int, help="as --context if not given")
    new.add_argument("--n-embd", type=int, default=192)
    new.add_argument("--n-layer", type=int, default=6)
    new.add_argument("--n-head", type=int, default=3)
    new.add_argument("--initializer-range", type=float, default=0.06, help="about 1 / sqrt(n-embd); GPT-1 has 0.02")

    sub = command("predict", predict_command, "Labels and probabilities from a fine-tuned model.", model=False)
    sub.add_argument("file", help="TSV, CSV or JSON lines with the task's columns")
    sub.add_argument("--model", required=True, help="a folder that train --task left", metavar="FOLDER")
    sub.add_argument("--output", metavar="FILE", help="JSON lines; standard output if not given")
    sub.add_argument("--device", help="cpu, cuda, cuda:1, …; a GPU if there is one")
    sub.add_argument("--batch-size", type=int, default=32)

    sub = command("bench", bench, "Time every op and the model against their strongest peers.", model=False)
    _bench_arguments(sub)

    sub = command("explain", explain_command, "Which backend runs each op, and why a faster one does not.", int8=True)
    sub.add_argument("--batch-size", type=int, default=1)
    sub.add_argument("--length", type=int, default=128)
    sub.add_argument("--strict", action="store_true", help="fail where an op does not run on triton")
    sub.add_argument("--json", action="store_true", help="print a JSON list")

    sub = command("warmup", warmup_command, "Compile and run what inference will need, before it does.")
    sub.add_argument("--batch-size", type=int, nargs="+", default=[1], help="rows; may name several")
    sub.add_argument("--json", action="store_true", help="print a JSON list, no progress bar")

    sub = command("env", env, "Versions and devices, for a bug report.", model=False)
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads our output, `head` say, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 128 + 13  # as the signal would have it
    except (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, FloatingPointError) as error:
        message = error.args[0] if isinstance(error, KeyError) else error  # str() of a KeyError is a repr
        print(f"gptfast: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"gptfast: interrupted{f': {interrupt}' if str(interrupt) else ''}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
