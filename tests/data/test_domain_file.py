import pytest

from drgr.data import load_domain_file
from drgr.data.domain_file import DomainSpec, FileSource, HubSource
from drgr.data.splits import Caps
from drgr.errors import DataError


@pytest.fixture
def write(tmp_path):
    def write(content, name="d.toml"):
        path = tmp_path / name
        path.write_text(content)
        return path

    return write


FULL = """
name = "mine"
[domains.a]
files = ["a/*.jsonl", "/abs/*.gz"]
format = "jsonl"
field = "body"
licence = "CC0"
weight = 2
train_bytes = 1000
block_bytes = 0
[domains.b]
dataset = "owner/name"
config = "en"
split = "validation"
revision = "v1"
weight = 1.5
"""


def test_every_key_is_read(write, tmp_path):
    spec = load_domain_file(write(FULL))
    first = DomainSpec(
        name="a",
        source=FileSource(
            patterns=(f"{tmp_path}/a/*.jsonl", "/abs/*.gz"), format="jsonl", field="body"
        ),
        caps=Caps(train=1000),
        block_bytes=0,
        licence="CC0",
        weight=2,
    )
    source = HubSource(dataset="owner/name", config="en", split="validation", revision="v1")
    second = DomainSpec(name="b", source=source, caps=Caps(), weight=1.5)
    assert (spec.name, spec.domains) == ("mine", (first, second))


def test_yaml_is_read_alike(write):
    text = "domains:\n  a: {files: a.txt}\n  7: {files: [b.txt], validation_bytes: 5}\n"
    spec = load_domain_file(str(write(text, "d.yaml")))
    assert (spec.name, [domain.name for domain in spec.domains]) == ("d", ["a", "7"])
    assert spec.domains[1].caps == Caps(validation=5)


def test_a_dataset_directory_beside_the_file_is_found(write, tmp_path):
    (tmp_path / "local").mkdir()
    (domain,) = load_domain_file(write('domains.a.dataset = "local"')).domains
    assert domain.source == HubSource(dataset=str(tmp_path / "local"))


A = '[domains.a]\nfiles = "x"\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nam = 'x'\n" + A, r"unknown key 'nam'; did you mean 'name'\?"),
        (A + "weigth = 1", r"domains\.a: unknown key 'weigth'; did you mean 'weight'\?"),
        (A + "config = 'en'", r"unknown key 'config'; known: licence, .*files"),
        (A + "field = 3", r"domains\.a\.field is 3; it must be a text"),
        (A + "format = 'csv'", r"format is 'csv'; choose one of text, jsonl, parquet"),
        (A + "train_bytes = 0", r"train_bytes is 0; it must be a whole number"),
        (A + "train_bytes = true", r"train_bytes is True; it must be a whole number"),
        (A + "test_bytes = 1.5", r"test_bytes is 1\.5; it must be a whole number"),
        (A + "validation_bytes = inf", r"validation_bytes is inf; it must be a whole number"),
        (A + "block_bytes = 10", r"block_bytes is 10; it must be 0 .* at least 1024"),
        (A + "weight = -1", r"weight is -1; it must be a finite number, 0 or more"),
        (A + "weight = nan", r"weight is nan; it must be a finite number"),
        (A + "weight = '1'", r"weight is '1'; it must be a finite number"),
        (A + "weight = 0", r"every weight is 0"),
        (A + "weight = 1\n[domains.b]\nfiles='y'", r"domains\.b has no weight; give all"),
        ("[domains.a]\nfiles = []", r"files is \[\]; it must be a glob or a list"),
        ("[domains.a]\nfiles = 3", r"files is 3; it must be a glob"),
        ("[domains.a]\ndataset = ''", r"dataset is empty"),
        (A + "dataset = 'x'", r"exactly one of 'files' .* and 'dataset'"),
        ("[domains.a]\nfield = 'x'", r"exactly one of 'files'"),
        ("[domains]\na = 3", r"domains\.a is 3; it must be a table"),
        ("[domains]", r"domains is \{\}; give at least one table"),
        ("domains = 3", r"domains is 3; give at least one table"),
        ('[domains."../x"]\nfiles = "x"', r"the name '\.\./x' must be letters"),
        ("name = 'a/b'\n" + A, r"name: the name 'a/b' must be letters"),
        ("[domains", r"d\.toml cannot be read: "),
    ],
)
def test_mistakes_are_named(write, content, message):
    with pytest.raises(DataError, match=message):
        load_domain_file(write(content))


@pytest.mark.parametrize("content", ["a: [", "- a", "!!python/object/apply:os.getcwd []"])
def test_malformed_yaml_is_refused_and_never_executed(write, content):
    with pytest.raises(DataError, match=r"d\.yaml (cannot be read|holds a list)"):
        load_domain_file(write(content, "d.yaml"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"domain file .*no\.toml does not exist"):
        load_domain_file(tmp_path / "no.toml")


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "d.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"d\.toml cannot be read"):
        load_domain_file(tmp_path / "d.toml")
