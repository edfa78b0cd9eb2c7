"""The command: each subcommand with its own options, faults in one line."""

import pytest

from experiments.__main__ import main
from experiments.records import of_kind, read_records, write_records


@pytest.fixture
def configs(tmp_path):
    """A folder of configs: the theory study with three seeds or two, and the claims that are computed from it."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "theory.yaml").write_text("# theory\nexperiment: theory\nseeds: 3\nquick: [seeds=2]\n")
    evidence = f"{{theory: {folder / 'theory.yaml'}}}"
    (folder / "claims.yaml").write_text(f"experiment: claims\nevidence: {evidence}\nquick: [small=true]\n")
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ["list", "--workers", "2"],
        ["list", "--dry-run"],
        ["list", "--quick"],
        ["list", "--results", "x"],
        ["claims", "--workers", "2"],
        ["claims", "--dry-run"],
        ["run", "x.yaml", "--configs", "y"],
    ],
)
def test_an_option_that_would_have_no_effect_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["abc", "0", "-1", "1.5"])
def test_workers_are_a_number(count, capsys):
    with pytest.raises(SystemExit):
        main(["run", "x.yaml", f"--workers={count}"])
    message = capsys.readouterr().err
    assert f"--workers: must be a whole number of at least 1, got {count}" in message
    assert "_positive" not in message


def test_the_help_of_run_says_how_to_leave_a_key_out(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert "~key" in capsys.readouterr().out


def test_results_are_a_folder(configs, tmp_path, capsys):
    (tmp_path / "file").touch()
    told = f"error: --results {tmp_path / 'file'} is a file; it takes a folder"
    for command in (["run", str(configs / "theory.yaml")], ["claims", "--configs", str(configs)]):
        assert main([*command, "--results", str(tmp_path / "file")]) == 2
        assert told in capsys.readouterr().err


def test_the_claims_of_the_quick_variant(configs, tmp_path, capsys):
    results = tmp_path / "results"
    assert main(["run", str(configs / "theory.yaml"), "--quick", "--results", str(results)]) == 0
    assert len(of_kind(read_records(results / "theory-quick.jsonl"), "claim")) == 5
    capsys.readouterr()
    options = ["--configs", str(configs), "--results", str(results)]
    assert main(["claims", "--quick", *options]) == 0
    out = capsys.readouterr().out
    assert "theory: results/theory-quick.jsonl" in out
    assert ", 2 seeds" in out
    write_records(results / "theory.jsonl", read_records(results / "theory-quick.jsonl"))
    assert main(["claims", *options]) == 0
    assert "theory: results/theory.jsonl" in capsys.readouterr().out
    assert main(["claims", "--quick", "--write", "README.md", *options]) == 2
    assert "leave --quick out" in capsys.readouterr().err


@pytest.mark.parametrize("override", ["seeds=[0", "~seed", "experiment=[theory]", "experiment={a: 1}"])
def test_no_traceback_for_a_slip(configs, capsys, override):
    assert main(["run", str(configs / "theory.yaml"), override]) == 2
    assert f"error: {configs / 'theory.yaml'}: " in capsys.readouterr().err
