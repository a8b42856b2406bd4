"""The command line: a verb, an optional recipe, and typed overrides. Imports torch only after parsing the arguments.

    openmimo VERB [RECIPE] [--overrides]

A recipe is a function in `recipes/`, or in a file of your own, that returns a complete config. `openmimo VERB RECIPE
--help` lists the main options, and `--help-all` every field with its type, default and meaning. An error that the user
can fix is printed as one paragraph, with exit code 1.
"""

import dataclasses
import errno
import importlib
import inspect
import io
import itertools
import os
import pkgutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape

import openmimo
from openmimo.arguments import UsageError, asks_for_help, paragraph, parse, split_options, usage_paragraph
from openmimo.core import config as config_io
from openmimo.core.errors import ConfigError, Interrupted, UserError, terminable
from openmimo.core.fields import field_types
from openmimo.core.records import SamplingParams, TextParams
from openmimo.core.registry import load_object
from openmimo.demo.config import ChainConfig, DemoConfig
from openmimo.engine.config import EngineConfig, WeightFormat, chosen_format
from openmimo.engine.server.config import ServerConfig
from openmimo.model.embedded import EMBEDDED, announce
from openmimo.own_data import Own, OwnProblems, own_data_of, with_own_data
from openmimo.parallel.config import PlanConfig
from openmimo.parallel.expert_load.config import ExpertsConfig
from openmimo.rl.agents.option_arguments import merged, plugin_arguments
from openmimo.rl.config import CompareConfig, MopdConfig, RlConfig
from openmimo.short_help import short_help
from openmimo.train.config import ExtendConfig, PhaseSettings, PretrainConfig, SftConfig, shortened

_STDERR = Console(stderr=True)


@dataclass(frozen=True)
class Verb:
    """One command.

    Attributes:
        help: One-line description.
        run: Runs the command with the arguments after the verb.
        kept: What remains of the work after a signal, for commands that do not report this themselves.
    """

    help: str
    run: Callable[[list[str]], None]
    kept: str = "nothing was written"


def main() -> None:
    """Runs the command in `sys.argv`. The entry point of `openmimo`.

    Exit codes: 1 for an error, 2 for invalid arguments, 128 + n after signal n.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (closed by the shell: >&-)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals without UTF-8
    # Spinning threads make a run on shared cores many times slower. Set before torch is imported, which reads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "--help-all", "help"):
        print(_overview())
        sys.exit(0 if arguments else 2)
    if arguments[0] in ("-V", "--version"):
        print(f"openmimo {openmimo.__version__}")
        sys.exit(0)
    try:
        if arguments[0] not in VERBS:
            raise ConfigError(f"there is no verb {arguments[0]!r}. Verbs: {', '.join(VERBS)}.")
        with terminable():
            VERBS[arguments[0]].run(arguments[1:])
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes again at exit
        sys.exit(1)
    except (UserError, OSError, MemoryError) as error:
        text = paragraph(_in_words(error))
        if not (isinstance(error, UsageError) and os.environ.get("RANK", "0") != "0"):  # process 0 prints the same
            _STDERR.print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True, highlight=False)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt as interrupt:
        number, kept = int(signal.SIGINT), ""
        if isinstance(interrupt, Interrupted):
            number, kept = interrupt.signal, interrupt.kept
        text = f"ended by {signal.Signals(number).name}: {kept or VERBS[arguments[0]].kept}"
        _STDERR.print(escape(f"{text.rstrip('.')}."), soft_wrap=True, highlight=False)
        sys.exit(128 + number)


def _in_words(error: UserError | OSError | MemoryError) -> str:
    """Returns the message of an error. Errors of files name the file and, for common causes, how to fix them."""
    if isinstance(error, MemoryError):
        return f"there is not enough memory. {error}"
    if isinstance(error, UserError):
        return str(error)
    ways = {
        errno.ENOSPC: " Make room and start the same command again; a run resumes from its newest checkpoint.",
        errno.EDQUOT: " Make room and start the same command again; a run resumes from its newest checkpoint.",
        errno.EROFS: " Name a writable folder.",
        errno.EACCES: " Change its permissions, or name another file.",
    }
    if error.errno is None or error.strerror is None or error.filename is None:
        return str(error)
    return f"{error.filename}: {error.strerror}.{ways.get(error.errno, '')}"


def _overview() -> str:
    lines = [f"  {name:<10}{verb.help}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: openmimo VERB [RECIPE] [--overrides]",
            "       openmimo VERB --from CONFIG.json [--overrides]\n",
            *lines,
            f"\nrecipes: {', '.join(recipe_names())}, or FILE.py:FUNCTION",
            "openmimo VERB [RECIPE] --help lists the main options, and --help-all explains every option.",
            "openmimo --version prints the version.",
        ]
    )


# --- recipes ---------------------------------------------------------------------------------------------------------


def recipe_names() -> list[str]:
    """Returns the names of the modules in `recipes/`."""
    return sorted(module.name for module in pkgutil.iter_modules(importlib.import_module("recipes").__path__))


def load_recipe(name: str, verb: str) -> Any:
    """Returns the config of a recipe.

    Args:
        name: A module of `recipes/`, `module:function`, or `path/file.py:function`.
        verb: The function that is called if `name` has none.

    Raises:
        ConfigError: There is no such module or function.
    """
    module_name, _, function = name.partition(":")
    if module_name.endswith(".py"):
        return load_object(f"{module_name}:{function or verb}")()
    if module_name not in recipe_names():
        raise ConfigError(f"there is no recipe {module_name!r}. Recipes: {', '.join(recipe_names())}.")
    module = importlib.import_module(f"recipes.{module_name}")
    functions = {
        key: value
        for key, value in vars(module).items()
        if callable(value) and value.__module__ == module.__name__ and not inspect.signature(value).parameters
    }
    if (function or verb) not in functions:
        raise ConfigError(
            f"recipe {module_name!r} has no function {function or verb!r}. Functions: {', '.join(functions)}. "
            f"Name one as {module_name}:FUNCTION."
        )
    return functions[function or verb]()


def _with_overrides(verb: str, arguments: list[str], config_type: type, default_recipe: str = "tiny_cpu") -> Any:
    """Returns the config of a recipe or of `--from config.json` with the user's own data and the overrides applied."""
    if arguments and arguments[0].split("=")[0] == "--from":
        name = "--from"
        path, rest = _after_from(arguments)
        default: Any = config_io.load(config_type, Path(path))
    elif any(word.split("=")[0] == "--from" for word in arguments):
        raise UsageError(f"--from FILE replaces the recipe: openmimo {verb} --from FILE [--overrides].")
    else:
        named = bool(arguments) and not arguments[0].startswith("-")
        name, rest = (arguments[0], arguments[1:]) if named else (default_recipe, arguments)
        default = load_recipe(name, verb)
    if not isinstance(default, config_type):
        raise ConfigError(
            f"recipe {name!r} returns {type(default).__name__}, but {verb} needs {config_type.__name__}; "
            "name another recipe or another verb."
        )
    prog = f"openmimo {verb} {name}"
    own_type = own_data_of(config_type)
    own, rest = (None, rest) if own_type is None else _own_data(own_type, rest, prog)
    if asks_for_help(rest):
        usage = f"openmimo {verb} [RECIPE | --from FILE] [OPTIONS]"
        note = (
            f"The defaults below are those of {name}. RECIPE is {', '.join(recipe_names())}, or FILE.py:FUNCTION of "
            "your own. --from FILE reads the config.json of a run, or a part of one, in place of a recipe."
        )
        print(short_help(default, usage=usage, main=_MAIN, note=note, own=own_type and own_type()))
        sys.exit(0)
    if own is not None:
        default = with_own_data(default, own)
    return parse(config_type, rest, prog, _with_short_warm_up(default, rest), listed=own)


_MAIN = (
    "checkpoint", "base", "run_folder", "folder", "model", "init_from", "steps", "sequence_length", "global_batch_size",
    "groups_per_step", "learning_rate", "algorithm", "signal", "teachers", "problems", "seed", "device", "dtype",
    "threads", "minutes",
)  # fmt: skip


def _with_short_warm_up(config: Any, arguments: list[str]) -> Any:
    """The config with a shorter warm-up where the arguments set fewer steps than it has, and do not set it as well."""
    words = [part.replace("_", "-") for word in arguments for part in word.split("=", 1)]
    if isinstance(config, PretrainConfig):
        stages = (_fitting(stage, f"--stages.{number}.", words) for number, stage in enumerate(config.stages))
        return dataclasses.replace(config, stages=tuple(stages))
    return _fitting(config, "--", words) if isinstance(config, PhaseSettings) else config


def _fitting(settings: Any, prefix: str, words: list[str]) -> Any:
    """One phase, for `_with_short_warm_up`."""
    steps = [value for option, value in itertools.pairwise(words) if option == f"{prefix}steps"]
    if not steps or not steps[-1].isdecimal() or {f"{prefix}warmup-steps", f"{prefix}constant-steps"} & set(words):
        return settings
    short = shortened(settings, int(steps[-1]))
    if short != settings:
        _STDERR.print(
            f"{prefix}steps {steps[-1]} shortens the warm-up from {settings.warmup_steps} to {short.warmup_steps} "
            f"steps ({prefix}warmup-steps sets it)",
            soft_wrap=True, highlight=False,
        )  # fmt: skip
    return short


def _own_data(own_type: type[Own], arguments: list[str], prog: str) -> tuple[Own, list[str]]:
    """The options for the user's own data, and the other arguments."""
    settings, arguments = plugin_arguments(arguments, "environment-options")
    own, others = split_options(own_type, arguments, prog)
    if not settings:
        return own, others
    if not isinstance(own, OwnProblems):
        raise UsageError(f"{prog}: --environment-options are options of openmimo rl.")
    return dataclasses.replace(own, environment_options=settings), others


def _after_from(arguments: list[str]) -> tuple[str, list[str]]:
    """Splits `--from FILE` or `--from=FILE` into the path of the file and the arguments after it."""
    _, equals, path = arguments[0].partition("=")
    given = [path] if equals else arguments[1:2]
    if not given or not given[0]:
        raise UsageError("--from needs the path of a config.json.")
    return given[0], arguments[1:] if equals else arguments[2:]


# --- verbs: training -------------------------------------------------------------------------------------------------


def _run_recipe(
    verb: str, config_type: type, function: str, default_recipe: str = "tiny_cpu"
) -> Callable[[list[str]], None]:
    """Returns the function that runs a verb with recipes.

    Args:
        verb: The verb.
        config_type: The type of its config.
        function: `module:name` of the function that runs a config. The module is imported after the arguments are
            parsed.
        default_recipe: The recipe if none is named.
    """

    def run(arguments: list[str]) -> None:
        if issubclass(config_type, RlConfig):
            config = _with_algorithm_options(verb, arguments, config_type)
        else:
            config = _with_overrides(verb, arguments, config_type, default_recipe)
        module, _, name = function.partition(":")
        getattr(importlib.import_module(module), name)(config)

    return run


def _with_algorithm_options(verb: str, arguments: list[str], config_type: type) -> Any:
    """Like `_with_overrides`, and also reads `--algorithm-options.NAME VALUE`, which tyro cannot parse."""
    options, others = plugin_arguments(arguments, "algorithm-options")
    config = _with_overrides(verb, others, config_type)
    return dataclasses.replace(config, algorithm_options=merged(config.algorithm_options, options))


def _merge(arguments: list[str]) -> None:
    def options(
        base: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="BASE")],
        destination: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DESTINATION")],
        children: tuple[str, ...],
        method: Literal["average", "task_arithmetic"] = "average",
        scale: float = 1.0,
    ) -> dict[str, Any]:
        """Merge the weights of checkpoints that were fine-tuned from one base.

        Args:
            base: The checkpoint from which all children were trained.
            destination: A folder for the merged model.
            children: The fine-tuned checkpoints.
            method: average (base + scale x mean of the weight changes) or task_arithmetic (base + scale x their sum).
            scale: Factor of the weight changes.
        """
        return locals()

    values = parse(options, arguments, "openmimo merge")
    from openmimo.model.merge import merge

    merge(
        values["base"], list(values["children"]), values["destination"],
        method=values["method"], scale=values["scale"],
    )  # fmt: skip


# --- verbs: checkpoints ----------------------------------------------------------------------------------------------


def _convert(arguments: list[str]) -> None:
    def options(
        source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")],
        destination: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DESTINATION")],
        dtype: str = "bfloat16",
        projections: str = "split",
        window_keys: int | None = None,
        max_shard_gigabytes: float = 4.0,
        quantize: str = "none",
        stages: int = 1,
        scales: str = "tensor",
    ) -> dict[str, Any]:
        """Rewrite a checkpoint folder in another dtype or layout; at most one shard is in memory.

        Args:
            source: A checkpoint folder in the Hugging Face layout, or a checkpoint of a run in shards.
            destination: A folder that does not exist yet.
            dtype: float32, bfloat16, float16, or fp8 (128 x 128 block scales, as published).
            projections: split (q, k, v) or fused_qkv (stacked by rank).
            window_keys: Keys that a query of a sliding layer sees, including its own (default: as in config.json).
            max_shard_gigabytes: Maximum size of a weight file.
            quantize: none, or a packed format for linear layers and experts: fairy2i (1 bit a weight and stage),
                fairy (complex models), binary, or ternary.
            stages: Stages of the packed format, 1 to 4. Each stores what the ones before it left over.
            scales: tensor or row: what shares the scales of the packed format.
        """
        return locals()

    values = parse(options, arguments, "openmimo convert")
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from openmimo.core.registry import load_object
    from openmimo.model.convert import ConvertConfig, convert
    from openmimo.model.hf import open_checkpoint

    config = ConvertConfig(
        dtype=values["dtype"],
        projections=values["projections"],
        window_keys=values["window_keys"],
        max_shard_gigabytes=values["max_shard_gigabytes"],
        quantize=values["quantize"],
        stages=values["stages"],
        scales=values["scales"],
    )
    with Progress(BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), console=_STDERR) as bar:

        def start(total_bytes: int) -> Callable[[int], None]:
            task = bar.add_task("convert", total=total_bytes)
            return lambda num_bytes: bar.advance(task, num_bytes)

        open_source = open_checkpoint
        if (Path(values["source"]) / "trainer" / "shards").is_dir():
            open_source = load_object("openmimo.parallel.shard_reader:open_shards")
        convert(values["source"], values["destination"], config, start=start, open_source=open_source)
    print(f"wrote {values['destination']}")


def _audit(arguments: list[str]) -> None:
    def options(model: tyro.conf.Positional[str] = "flash", quantized: bool = False, tensors: bool = False) -> tuple:
        """Count the parameters of a model and list the tensors of its checkpoint, without allocating them.

        Args:
            model: A preset, or the path of a config.json.
            quantized: Include the scales of the published FP8 layout.
            tensors: Print the name and shape of every tensor.
        """
        return model, quantized, tensors

    model, quantized, tensors = parse(options, arguments, "openmimo audit")
    from openmimo.model.audio.audit import audit_audio, is_audio_model, print_audio_audit
    from openmimo.model.audio.language_config import audio_model_config
    from openmimo.model.audit import audit, print_audit
    from openmimo.model.presets import model_config

    if is_audio_model(model):
        print_audio_audit(audit_audio(audio_model_config(model)), list_tensors=tensors)
        return
    print_audit(audit(model_config(model), quantized=quantized), list_tensors=tensors)


def _plan(arguments: list[str]) -> None:
    options = _parse_options(
        PlanConfig, arguments, "plan [RECIPE]", ("recipe", "gpus", "gpu", "stage", "dry_run", "longest")
    )
    config = load_recipe(options.recipe, "pretrain")
    if not isinstance(config, PretrainConfig):
        raise ConfigError(f"recipe {options.recipe!r} returns {type(config).__name__}; plan needs a PretrainConfig.")
    if options.stage >= len(config.stages):
        raise ConfigError(f"--stage is {options.stage}, but recipe {options.recipe!r} has {len(config.stages)} stages.")
    stage = config.stages[options.stage]
    from openmimo.model.hf import load_config
    from openmimo.model.presets import model_config
    from openmimo.parallel.plan import StepShape
    from openmimo.parallel.print_plan import print_plan

    step = StepShape(
        sequence_length=stage.sequence_length,
        rows=stage.global_batch_size,
        micro_batch_rows=options.micro_batch_size,
        recompute=options.recompute,
        cp_exchange=config.parallel.cp_exchange,
    )
    model = load_config(config.init_from) if config.init_from else model_config(config.model or "tiny")
    print_plan(options, model, step)


@dataclass(frozen=True)
class ExpertsOptions:
    """Show the expert load of a run: its map over layers and time, forecasts, and a placement on devices.

    Attributes:
        path: The folder of a run that was trained with --expert-trace. The page `experts.html` is written there.
    """

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    settings: Annotated[ExpertsConfig, tyro.conf.arg(name="")] = ExpertsConfig()


def _experts(arguments: list[str]) -> None:
    main = ("path", "horizon", "predictors", "devices", "spare_slots", "nodes", "groups")
    options = _parse_options(ExpertsOptions, arguments, "experts RUN", main)
    from openmimo.parallel.expert_load.page import write_page

    print(f"wrote {write_page(Path(options.path), options.settings)}")


# --- verbs: generation -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpeakOptions:
    """Chat with a checkpoint in the terminal.

    Attributes:
        path: A checkpoint folder with a tokenizer (default: the built-in tiny model).
        dtype: Dtype of weights and activations.
        device: auto (an accelerator if there is one), cpu, or a torch device.
        weights: Storage of weight matrices: plain (in dtype), int8, fp8 (as an FP8 checkpoint stores them), or a
            packed format: fairy2i, fairy, ternary, binary (as a converted checkpoint stores them). int8 and fp8 take
            half the bytes of bfloat16, packed formats an eighth or a sixteenth.
        thinking: Let the model think before it answers.
        system: The system message of the chat.
    """

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")] = EMBEDDED
    text: Annotated[TextParams, tyro.conf.arg(name="")] = TextParams()
    engine: Annotated[EngineConfig, tyro.conf.arg(name="")] = EngineConfig(mixed_prefill_tokens=1024)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    weights: WeightFormat = "plain"
    thinking: bool = False
    system: str | None = None

    def sampling(self) -> SamplingParams:
        """The parameters of a request. A terminal shows the text only, so no other results are requested."""
        return SamplingParams(**{name: getattr(self.text, name) for name in field_types(TextParams)})


@dataclass(frozen=True)
class GenerateOptions(SpeakOptions):
    """Continue a text, or answer it as a chat message.

    Attributes:
        prompt: The text; "-" reads it from standard input.
        chat: Apply the chat template to the prompt.
    """

    prompt: str = "-"
    chat: bool = False


_SPEAK = (
    "system", "thinking", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "dtype", "weights", "device",
)  # fmt: skip


def _parse_options(options_type: type, arguments: list[str], usage: str, main: Sequence[str]) -> Any:
    """Parses the options of a verb without recipes, or prints its short help, which explains the options `main`."""
    if asks_for_help(arguments):
        usage = f"openmimo {usage} [OPTIONS]"
        print(short_help(options_type, usage=usage, main=main))
        sys.exit(0)
    return parse(options_type, arguments, f"openmimo {usage.split()[0]}")


def _generate(arguments: list[str]) -> None:
    options = _parse_options(GenerateOptions, arguments, "generate [PATH]", ("path", "prompt", "chat", *_SPEAK))
    if not options.chat and (options.thinking or options.system):
        raise ConfigError(
            "--thinking and --system are settings of the chat template and have no effect without --chat; add --chat."
        )
    from openmimo.engine import terminal

    terminal.check_prompt(options.prompt)
    terminal.generate(
        _load(options), options.prompt, options.sampling(),
        as_chat=options.chat, thinking=options.thinking, system=options.system,
    )  # fmt: skip


def _chat(arguments: list[str]) -> None:
    options = _parse_options(SpeakOptions, arguments, "chat [PATH]", ("path", *_SPEAK))
    from openmimo.engine import terminal

    terminal.chat(_load(options), options.sampling(), thinking=options.thinking, system=options.system)


def _load(options: SpeakOptions) -> Any:
    announce(options.path)
    from openmimo.engine import terminal

    return terminal.load(
        options.path, options.engine, dtype=options.dtype, device=options.device, weights=options.weights
    )


@dataclass(frozen=True)
class ServeOptions:
    """Serve a checkpoint: an OpenAI-compatible API under /v1, a chat page at /, metrics at /metrics.

    Attributes:
        path: A checkpoint folder with a tokenizer (default: the built-in tiny model; none with --stub).
        stub: Serve no model, for tests of clients: the server echoes every message word by word.
        dtype: Dtype of weights and activations (auto: bfloat16 on an accelerator, else float32).
        device: auto (an accelerator if there is one), cpu, or a torch device.
        threads: CPU threads for the model (none: all cores). With --tp, they are shared by the ranks.
        weights: Storage of weight matrices: plain (in dtype), int8, fp8 (as an FP8 checkpoint stores them), or a
            packed format: fairy2i, fairy, ternary, binary (as a converted checkpoint stores them). int8 and fp8 take
            half the bytes of bfloat16, packed formats an eighth or a sixteenth.
        int8: Earlier name of --weights int8.
    """

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")] = EMBEDDED
    server: Annotated[ServerConfig, tyro.conf.arg(name="")] = ServerConfig()
    engine: Annotated[EngineConfig, tyro.conf.arg(name="")] = EngineConfig()
    stub: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    threads: int | None = None
    weights: WeightFormat = "plain"
    int8: bool = False


def _serve(arguments: list[str]) -> None:
    main = ("path", "host", "port", "api_key", "dtype", "weights", "device", "threads", "max_sequences",
            "tp", "ep")  # fmt: skip
    options = _parse_options(ServeOptions, arguments, "serve [PATH]", main)
    if options.stub and options.path != EMBEDDED:
        raise ConfigError("give either the folder of a checkpoint, or --stub to run without a model.")
    if options.stub and options.engine != EngineConfig():
        raise ConfigError(
            "--stub serves no model, so --tp and the other options of the engine do nothing; leave them or --stub out."
        )
    from openmimo.engine.server.serve import launch, launch_stub

    if options.stub:
        launch_stub(options.server)
    else:
        announce(options.path)
        launch(
            options.path, options.server, options.engine,
            dtype=options.dtype, device=options.device, threads=options.threads,
            weights=chosen_format(options.weights, int8=options.int8),
        )  # fmt: skip


def _audio(arguments: list[str]) -> None:
    from openmimo import audio_commands

    def run_recipe(command: audio_commands.RecipeCommand, words: list[str]) -> None:
        config_type = load_object(command.config)
        _run_recipe(f"audio {command.name}", config_type, command.function, command.recipe)(words)

    audio_commands.run(arguments, run_recipe)


# --- verbs: measurement ----------------------------------------------------------------------------------------------


def _eval(arguments: list[str]) -> None:
    from openmimo.evals.config import EvalConfig

    main = ("path", "text", "text_field", "text_tokens", "window", "suite", "task", "lengths", "examples", "base_url",
            "run_folder", "engine_check", "output", "device", "dtype", "seed")  # fmt: skip
    config = _parse_options(EvalConfig, arguments, "eval [PATH]", main)
    announce(config.path)
    from openmimo.evals.runner import run_and_print

    run_and_print(config)


def _bench(arguments: list[str]) -> None:
    clone = str(Path(__file__).parents[1])
    if clone not in sys.path:
        sys.path.append(clone)  # an installed script does not search the folder of the clone
    try:
        bench = importlib.import_module("benchmarks.bench_cpu")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the benchmarks need a clone of the source and its development packages (make test installs them): {error}"
        ) from error
    with usage_paragraph("openmimo bench"):
        options = bench.parse(arguments)
    bench.run(options)


_KEPT_RUN = "the checkpoints written so far are kept, and the same command resumes from the newest"
_KEPT_DEMO = "finished parts and checkpoints are kept, and the same command resumes from them"
VERBS: dict[str, Verb] = {
    "demo": Verb(
        "train, extend, post-train and measure a tiny model on a laptop; writes report.html",
        _run_recipe("demo", DemoConfig, "openmimo.demo.story:run"),
        _KEPT_DEMO,
    ),
    "chain": Verb(
        "pre-train, extend, post-train and compare on one device, in pieces of --minutes",
        _run_recipe("chain", ChainConfig, "openmimo.demo.chain:run", "small_1gpu"),
        _KEPT_DEMO,
    ),
    "pretrain": Verb(
        "pre-train in stages from a recipe",
        _run_recipe("pretrain", PretrainConfig, "openmimo.train.pretrain:pretrain"),
        _KEPT_RUN,
    ),
    "extend": Verb(
        "extend the context of a checkpoint",
        _run_recipe("extend", ExtendConfig, "openmimo.train.pretrain:extend"),
        _KEPT_RUN,
    ),
    "sft": Verb(
        "fine-tune a checkpoint on conversations or demonstrations",
        _run_recipe("sft", SftConfig, "openmimo.train.pretrain:sft"),
        _KEPT_RUN,
    ),
    "rl": Verb(
        "reinforcement learning with verifiable rewards, from a checkpoint",
        _run_recipe("rl", RlConfig, "openmimo.rl.run:train"),
        _KEPT_RUN,
    ),
    "mopd": Verb(
        "distill teachers into a student on the student's own answers",
        _run_recipe("mopd", MopdConfig, "openmimo.rl.run:train"),
        _KEPT_RUN,
    ),
    "compare": Verb(
        "evaluate base, teachers and students in every domain; writes a see-saw report",
        _run_recipe("compare", CompareConfig, "openmimo.rl.compare:compare"),
        "no report was written; the models are evaluated again",
    ),
    "merge": Verb("merge the weights of fine-tuned checkpoints", _merge, "the merged model was not written"),
    "eval": Verb(
        "evaluate a checkpoint or server at several context lengths, its loss on your text, or the engine at length",
        _eval,
        "the scores so far are kept only with --run-folder, where the same command goes on",
    ),
    "generate": Verb("continue a prompt", _generate, "only the text so far was generated"),
    "chat": Verb("chat with a checkpoint in the terminal", _chat, "the conversation is not kept"),
    "serve": Verb(
        "serve a checkpoint: OpenAI-compatible API and a chat page",
        _serve,
        "the server has stopped; unfinished answers are cut off",
    ),
    "audio": Verb(
        "speech: encode, decode, transcribe, speak, chat, corpora, and a demo that trains on real speech",
        _audio,
        "finished files are kept, and the same command of a training run or demo resumes",
    ),
    "convert": Verb(
        "rewrite a checkpoint in another dtype or layout",
        _convert,
        "the new checkpoint was not written; the old one is unchanged",
    ),
    "plan": Verb("predict memory, messages and time of a recipe on a number of accelerators", _plan),
    "experts": Verb(
        "show the expert load of a run, its forecast, and a placement on devices; writes experts.html", _experts
    ),
    "audit": Verb("count the parameters and tensors of a model without allocating them", _audit),
    "bench": Verb(
        "compare the speed of kernels, training and decoding with other implementations",
        _bench,
        "the measurements so far are not kept",
    ),
}

if __name__ == "__main__":
    main()
