# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The command `tocom`: what it lists, how every command explains itself, and how every one of them ends."""

import errno
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers.paths import EXAMPLES, ROOT
from helpers.scripts import load_script

import tocom_hf
from tocom_hf import DegreeError, DistillationInterrupted, MissingExtraError
from tocom_hf.cli import main as cli
from tocom_hf.cli.endings import CommandParser, end_like_a_command, extras_or_exit, run_command


CHECKPOINT = ROOT / "examples/digits/checkpoint"
PLUGINS = ROOT / "hub_cards/tocom-vit-mix"
IMAGES = ROOT / "examples/digits/test.parquet"
# the command of every script that is one
SCRIPTS = {
    "distill": "distill",
    "evaluate": "evaluate",
    "finetune": "finetune",
    "fit_scales": "fit-scales",
    "push_to_hub": "push",
    "convert_official": "convert",
    "visualize": "visualize",
    "serve": "serve",
}
OTHER_SCRIPTS = ["quickstart", "model_arithmetic", "reproduce_fashion_mnist"]


def help_of(main, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_every_example_script_is_known_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SCRIPTS, *OTHER_SCRIPTS}


def test_it_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    module, _, function = project["project"]["scripts"]["tocom"].partition(":")
    assert getattr(importlib.import_module(module), function) is cli.main
    assert {"tocom_hf.cli", "tocom_hf.serving", "tocom_hf.prediction"} <= {*project["tool"]["setuptools"]["packages"]}


def test_help_lists_every_command_with_one_line(capsys):
    lines = help_of(cli.main, capsys).splitlines()
    for name, (_, summary) in cli.COMMANDS.items():
        assert [line.split(maxsplit=1)[1] for line in lines if line.split()[:1] == [name]] == [summary]


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"tocom {tocom_hf.__version__}\n"


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_load_nothing_heavy(option):
    code = (
        "import sys\n"
        "from tocom_hf.cli.main import main\n"
        "try:\n"
        f"    main([{option!r}])\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'datasets', 'accelerate', 'huggingface_hub'}\n"
        "    print(sorted(heavy & {*sys.modules}), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == "[]\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command_shows_how_to_call_it(name, capsys):
    text = help_of(lambda argv: cli.main([name, *argv]), capsys)
    examples = [line for line in text.splitlines() if line.startswith(f"    tocom {name} ")]
    assert examples
    assert text.startswith(f"usage: tocom {name} ")


@pytest.mark.parametrize(("script", "command"), SCRIPTS.items())
def test_a_script_has_the_flags_of_its_command(script, command, capsys):
    module = importlib.import_module(f"tocom_hf.cli.{cli.COMMANDS[command][0]}")
    assert help_of(load_script(script).main, capsys) == help_of(module.main, capsys)


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name not in ("distill", "finetune")])
def test_most_commands_explain_themselves_without_torch(name):
    """Their options are looked at before anything heavy is imported."""
    module = cli.COMMANDS[name][0]
    code = (
        "import sys\n"
        f"from tocom_hf.cli.{module} import main\n"
        "assert main(['--nothing']) == 2\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False\n"


def test_no_command_and_an_unknown_one(capsys):
    for argv in ([], ["--nothing"], ["merge"]):
        assert cli.main(argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("tocom: error: expected a command")
        assert line.endswith("(see tocom --help)")
        assert all(name in line for name in cli.COMMANDS)


NOWHERE = "no/where/at/all"
TRAINING = ("--dataset_name", IMAGES, "--output_dir", "out")
PREDICTION = ("--dataset_name", IMAGES, "--target_r", 4, "--output", "out")
WRONG_USE = [
    ("merge-report", [], "MODEL"),
    ("merge-report", [NOWHERE], NOWHERE),
    ("merge-report", [CHECKPOINT, "--target_r", "-1"], "DegreeError"),
    ("merge-report", [CHECKPOINT, "--target_r", "two"], "invalid int value: 'two'"),
    ("merge-report", [CHECKPOINT, "--image_size", "28", "28", "28"], "--image_size takes one number, or two"),
    ("merge-report", [CHECKPOINT, "--image_size", "2"], "ArgumentError: image_size must be at least a patch"),
    ("merge-report", [CHECKPOINT, "--batch_size", "0"], "expected a positive integer"),
    ("merge-report", [CHECKPOINT, "--target_speedup", "0"], "--target_speedup must be positive"),
    ("merge-report", [CHECKPOINT, "--device", "abacus"], "The device 'abacus' cannot be used"),
    ("calibrate", [NOWHERE], NOWHERE),
    ("calibrate", [CHECKPOINT, "--seconds", "-1"], "--seconds must not be negative"),
    ("calibrate", [CHECKPOINT, "--plugins", PLUGINS, "--source_r", "4"], "DegreeError: source_r=4 contradicts"),
    ("calibrate", [CHECKPOINT, "--plugins", PLUGINS, "--target_r", "40"], "DegreeError: target_r=40 is outside"),
    ("calibrate", [CHECKPOINT, "--output", "."], "ArgumentError: . is a folder"),
    ("distill", [], "--model_name_or_path"),
    ("distill", ["--preset", "author", *TRAINING], "argument --preset: invalid choice: 'author'"),
    ("distill", ["--model_name_or_path", CHECKPOINT, "--dataset_name", IMAGES], "--output_dir is required"),
    ("distill", ["--model_name_or_path", NOWHERE, *TRAINING], f"The model '{NOWHERE}' cannot be loaded"),
    ("distill", ["--model_name_or_path", CHECKPOINT, *TRAINING, "--bogus", "1"], "unrecognized arguments: --bogus 1"),
    ("distill", ["--model_name_or_path", CHECKPOINT, *TRAINING, "--mixed_precision", "fp3"], "Accelerate cannot start"),
    ("finetune", [], "--model_name_or_path"),
    ("finetune", ["--model_name_or_path", NOWHERE, *TRAINING], f"The model '{NOWHERE}' cannot be loaded"),
    ("finetune", ["--model_name_or_path", CHECKPOINT, *TRAINING, "--bogus"], "unrecognized arguments: --bogus"),
    ("finetune", ["--model_name_or_path", CHECKPOINT, *TRAINING, "--load_best_model_at_end"], "load_best_model_at_end"),
    (
        "finetune",
        ["--model_name_or_path", CHECKPOINT, *TRAINING, "--resume_from_checkpoint", NOWHERE],
        f"{NOWHERE} is not a folder",
    ),
    (
        "finetune",
        ["--model_name_or_path", CHECKPOINT, *TRAINING, "--lora_rank", "2", "--lora_target_modules", "nothing"],
        "The layers of --lora_target_modules cannot be adapted",
    ),
    (
        "finetune",
        ["--model_name_or_path", CHECKPOINT, *TRAINING, "--report_to", "abacus"],
        "abacus",
    ),
    ("evaluate", ["--checkpoints", CHECKPOINT], "--dataset_name"),
    (
        "evaluate",
        ["--checkpoints", NOWHERE, "--target_r", "4", *TRAINING],
        f"The model '{NOWHERE}' cannot be loaded",
    ),
    (
        "evaluate",
        ["--checkpoints", CHECKPOINT, "--target_r", "4", "--dataset_name", "none.parquet", "--output_dir", "out"],
        "DatasetError: There is no file or folder 'none.parquet'",
    ),
    ("fit-plugins", ["--model_name_or_path", NOWHERE, "--max_r", "4", *TRAINING], NOWHERE),
    ("fit-plugins", ["--model_name_or_path", NOWHERE, "--max_r", "0", *TRAINING], "--max_r"),
    ("find-recipe", ["--degrees", "4"], "--model_name_or_path"),
    ("find-recipe", ["--model_name_or_path", NOWHERE, "--degrees", "4", *TRAINING], NOWHERE),
    ("fit-scales", ["--plugins", PLUGINS], "--model_name_or_path"),
    ("fit-scales", ["--model_name_or_path", CHECKPOINT, "--plugins", NOWHERE, *TRAINING], NOWHERE),
    ("convert", ["--output_dir", "out"], "--plugins --weights is required"),
    ("convert", ["--weights", "none.pth", "--output_dir", "out"], "PluginFileError: none.pth cannot be read"),
    (
        "convert",
        ["--plugins", IMAGES, "--model_name_or_path", NOWHERE, "--output_dir", "out"],
        f"The model '{NOWHERE}' cannot be loaded",
    ),
    ("convert", ["--weights", "x.pth", "--output_dir", "out", "--crop_pct", "0"], "--crop_pct must be in (0, 1]"),
    ("push", ["only-a-folder"], "repo_id"),
    ("push", [NOWHERE, "user/name"], f"ArgumentError: There is no folder {NOWHERE}"),
    ("push", [CHECKPOINT, "user/name", "--card_only"], "ArgumentError: --card_only expects the folder of a plugin set"),
    ("visualize", [], "--model_name_or_path"),
    ("visualize", ["--model_name_or_path", CHECKPOINT], "one of --images and --dataset_name is required"),
    ("visualize", ["--model_name_or_path", NOWHERE, "--images", "x.png"], f"The model '{NOWHERE}' cannot be loaded"),
    ("visualize", ["--model_name_or_path", CHECKPOINT, "--images", "x.png"], "The image x.png cannot be read"),
    ("visualize", ["--model_name_or_path", CHECKPOINT, "--dataset_name", IMAGES, "--layer", "12"], "--layer 12"),
    (
        "visualize",
        ["--model_name_or_path", CHECKPOINT, "--images", IMAGES, "--output", "no/x.png"],
        "--output no/x.png",
    ),
    ("visualize", ["--model_name_or_path", CHECKPOINT, "--dataset_name", IMAGES, "--size", "9"], "--size 9 is too"),
    ("predict", ["--model_name_or_path", CHECKPOINT, "--target_r", "4"], "--dataset_name"),
    ("predict", ["--model_name_or_path", NOWHERE, *PREDICTION], NOWHERE),
    ("predict", ["--model_name_or_path", CHECKPOINT, *PREDICTION, "--device", "abacus"], "The device 'abacus'"),
    ("predict", ["--model_name_or_path", CHECKPOINT, *PREDICTION, "--source_r", "0"], "needs plugins"),
    ("serve", [], "--model_name_or_path"),
    ("serve", ["--model_name_or_path", CHECKPOINT, "--latency_ms", "0"], "--latency_ms must be positive"),
    ("serve", ["--model_name_or_path", NOWHERE], NOWHERE),
    ("serve", ["--model_name_or_path", CHECKPOINT, "--device", "abacus"], "The device 'abacus' cannot be used"),
    ("export", [CHECKPOINT], "FOLDER"),
    ("export", [NOWHERE, "out"], NOWHERE),
    ("export", [CHECKPOINT, "out", "--format", "tflite"], "invalid choice: 'tflite'"),
    ("export", [CHECKPOINT, "out", "--degrees", "-1"], "DegreeError"),
    ("export", [CHECKPOINT, "out", "--source_r", "0", "--degrees", "4"], "The model has no plugins"),
    ("export", [CHECKPOINT, CHECKPOINT], "and no export. Give a folder that is missing, empty, or an earlier export"),
    ("quickstart", ["--bogus"], "unrecognized arguments: --bogus (see quickstart.py --help)"),
    ("quickstart", ["--model_name_or_path", NOWHERE], NOWHERE),
    ("model_arithmetic", [], "--target_a"),
    (
        "model_arithmetic",
        [
            "--target_a",
            NOWHERE,
            "--source_a",
            NOWHERE,
            "--source_b",
            NOWHERE,
            "--dataset_name",
            IMAGES,
            "--output",
            "x",
        ],
        f"The model '{NOWHERE}' cannot be loaded",
    ),
    ("reproduce_fashion_mnist", ["--output_dir", "out", "--data_dir", "none"], "There is no file none/"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), WRONG_USE, ids=range(len(WRONG_USE)))
def test_wrong_use_ends_with_one_line(refused, tmp_path, name, arguments, message):
    line = refused(name, *arguments)
    assert message in line
    assert not (tmp_path / "out").exists()


def test_wrong_use_is_tested_for_every_command_and_script():
    assert {name for name, _, _ in WRONG_USE} == {*cli.COMMANDS, *OTHER_SCRIPTS}


@pytest.mark.parametrize(("script", "command"), SCRIPTS.items())
def test_scripts_end_as_their_commands_do(script, command, offline, capsys):
    assert load_script(script).main(["--bogus"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tocom {command}: error: ")
    assert line.endswith(f"(see tocom {command} --help)")


def ending(error, capsys):
    """The exit code and stderr of a command whose job raises."""

    def job(args):
        raise error

    code = run_command("tocom test", CommandParser("tocom test").parse_args, job, [])
    return code, capsys.readouterr().err


def test_how_a_command_ends(capsys):
    several = DegreeError("one\n  two\n\nthree")
    assert ending(several, capsys) == (2, "tocom test: error: DegreeError: one two three\n")
    missing = FileNotFoundError(errno.ENOENT, "No such file or directory", "x")
    code, errors = ending(missing, capsys)
    assert (code, len(errors.splitlines())) == (2, 1)
    assert "FileNotFoundError" in errors
    assert ending(DistillationInterrupted("stopped at step 3", 15), capsys) == (128 + 15, "stopped at step 3\n")
    assert ending(BrokenPipeError(), capsys) == (141, "")


@pytest.mark.parametrize("error", [AssertionError("x"), IndexError("x"), ValueError("x"), KeyboardInterrupt()])
def test_mistakes_of_the_package_show_their_traceback(error, capsys):
    with pytest.raises(type(error)):
        ending(error, capsys)


def test_a_missing_extra_is_named(capsys):
    code, errors = ending(ModuleNotFoundError("No module named 'datasets'", name="datasets"), capsys)
    assert code == 2
    assert "MissingExtraError: tocom test needs datasets" in errors
    assert "pip install 'tocom-hf[train]'" in errors
    with pytest.raises(ModuleNotFoundError) as caught:
        ending(ModuleNotFoundError("No module named 'ours'", name="ours"), capsys)
    assert not isinstance(caught.value, MissingExtraError)
    with pytest.raises(SystemExit) as stopped, extras_or_exit("quickstart.py"):
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
    assert stopped.value.code == 2
    assert "quickstart.py: error: MissingExtraError" in capsys.readouterr().err


MISSING = {
    "distill": "accelerate",
    "finetune": "accelerate",
    "evaluate": "accelerate",
    "find-recipe": "datasets",
    "fit-plugins": "datasets",
    "fit-scales": "datasets",
    "visualize": "PIL",
    "predict": "datasets",
    "serve": "uvicorn",
    "calibrate": "matplotlib",
    "export": "onnxscript",
}
COMPLETE = {
    "distill": ["--model_name_or_path", CHECKPOINT, *TRAINING],
    "finetune": ["--model_name_or_path", CHECKPOINT, *TRAINING],
    "evaluate": ["--checkpoints", CHECKPOINT, "--target_r", 4, *TRAINING],
    "find-recipe": ["--model_name_or_path", CHECKPOINT, "--degrees", 4, *TRAINING],
    "fit-plugins": ["--model_name_or_path", CHECKPOINT, "--max_r", 4, *TRAINING],
    "fit-scales": ["--model_name_or_path", CHECKPOINT, "--plugins", PLUGINS, *TRAINING],
    "visualize": ["--model_name_or_path", CHECKPOINT, "--images", "x.png"],
    "predict": ["--model_name_or_path", CHECKPOINT, "--plugins", PLUGINS, *PREDICTION],
    "serve": ["--model_name_or_path", CHECKPOINT],
    "calibrate": [CHECKPOINT, "--plot", "x.png"],
    "export": [CHECKPOINT, "out"],
}


@pytest.mark.parametrize(("name", "package"), MISSING.items())
def test_every_command_names_the_extra_that_it_needs(refused, monkeypatch, name, package):
    """A module that is `None` in `sys.modules` cannot be found."""
    monkeypatch.setitem(sys.modules, package, None)
    for module in ("tocom_hf.data.images", "tocom_hf.serving.server"):  # that import it
        monkeypatch.delitem(sys.modules, module, raising=False)
    line = refused(name, *COMPLETE[name])
    assert f"MissingExtraError: tocom {name} needs {package}" in line
    assert "pip install 'tocom-hf[" in line


@pytest.mark.parametrize("name", ["distill", "evaluate", "finetune", "find_recipe", "fit_plugins", "fit_scales"])
def test_commands_that_train_name_one_extra_for_all(monkeypatch, capsys, name):
    """Also for a package that a smaller extra brings."""
    module = importlib.import_module(f"tocom_hf.cli.{name}")

    def run(command, parse_args, job, argv, **settings):
        def lacks_pillow(arguments):
            raise ModuleNotFoundError("No module named 'PIL'", name="PIL")

        return run_command(command, lambda argv: None, lacks_pillow, argv, **settings)

    monkeypatch.setattr(module, "run_command", run)
    assert module.main([]) == 2
    assert "needs PIL, which is not installed. Run: pip install 'tocom-hf[train]'" in capsys.readouterr().err


def test_a_reader_that_has_gone_is_no_error():
    """As in `tocom evaluate ... | head -0`."""
    code = (
        "import sys\n"
        "from tocom_hf.cli.endings import end_like_a_command\n"
        "sys.exit(end_like_a_command('tocom x', lambda: print('figures')))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(60), errors) == (141, b"")


def test_a_command_is_a_process_with_an_exit_code():
    done = subprocess.run(
        [sys.executable, "-m", "tocom_hf.cli.convert", "--bogus"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert (done.stdout, len(done.stderr.splitlines())) == ("", 1)
    assert "Traceback" not in done.stderr


def test_a_job_that_parses_itself_ends_likewise(capsys):
    def explain():
        CommandParser("tocom x").error("no\nsuch option")

    assert end_like_a_command("tocom x", explain) == 2
    assert capsys.readouterr().err == "tocom x: error: no such option (see tocom x --help)\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="There is no full device here.")
def test_what_a_service_says_need_not_be_written():
    code = "from tocom_hf.cli.endings import say; say('one'); say('two')"
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
