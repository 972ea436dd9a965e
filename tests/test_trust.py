"""What others made runs no code here, takes no more memory than it is worth, and stays in its place."""

import hashlib
import json
import os
import pickle
import re
import socket
import struct
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from conftest import toy_study
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import EpsImagePlugin, Image, PngImagePlugin
from test_folders import classes_of
from torch import Tensor, nn
from written import index, reports

import utilized_rank as ur
from utilized_rank.base.sections import StudyError
from utilized_rank.commands.compressing import checked
from utilized_rank.commands.measuring import measure as measured
from utilized_rank.datasets import sources
from utilized_rank.datasets.images import decoded
from utilized_rank.datasets.sections import Data
from utilized_rank.report import pages
from utilized_rank.study.config import parse_study
from utilized_rank.study.homes import compose
from utilized_rank.study.opened import open_study
from utilized_rank.training import models
from utilized_rank.training.sections import Model

ROOT = Path(__file__).parents[1]


class Code:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Room:
    """Unpickling it takes so many bytes."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __reduce__(self):
        return bytearray, (self.size,)


def refused(path: Path) -> str:
    """What is said of a checkpoint that is refused: one line, with its name."""
    with pytest.raises(StudyError) as caught:
        models.tensors_of(path)
    said = str(caught.value)
    assert str(path) in said
    assert "\n" not in said
    assert "weights_only" not in said  # no advice to run it
    return said


# Checkpoints


def _tar(path: Path, code: Code) -> None:
    with tarfile.open(path, "w") as file:
        for name in ("pickle", "storages", "tensors"):
            member, content = tarfile.TarInfo(name), pickle.dumps(code)
            member.size = len(content)
            file.addfile(member, BytesIO(content))


def _archive_in_archive(path: Path, code: Code) -> None:
    torch.save(code, inner := path.with_name("inner.pth"))
    with zipfile.ZipFile(path, "w") as file:
        file.write(inner, "archive/data.pkl")


def _script(path: Path, code: Code) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(path)


WITH_CODE: dict[str, Callable[[Path, Code], None]] = {
    "archive": lambda path, code: torch.save({"w": torch.ones(2), "more": code}, path),
    "legacy": lambda path, code: torch.save({"w": code}, path, _use_new_zipfile_serialization=False),
    "pickle": lambda path, code: path.write_bytes(pickle.dumps(code)),
    "oldest pickle": lambda path, code: path.write_bytes(pickle.dumps(code, protocol=0)),
    "nested": lambda path, code: torch.save({"model": {"state_dict": {"w": [(code,)]}}}, path),
    "as a key": lambda path, code: torch.save({"model": {("w", code): torch.ones(2)}}, path),
    "tar": _tar,
    "archive in an archive": _archive_in_archive,
    "script": _script,
}


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", WITH_CODE.values(), ids=WITH_CODE)
@pytest.mark.parametrize("suffix", ["pt", "pth"])
def test_a_checkpoint_with_code_is_refused_in_one_line_and_its_code_not_run(tmp_path, write, suffix):
    write(tmp_path / f"a.{suffix}", Code(tmp_path / "made"))
    assert "cannot be read" in refused(tmp_path / f"a.{suffix}")
    assert not (tmp_path / "made").exists()


def test_a_pickle_among_the_bytes_of_a_checkpoint_stays_bytes(tmp_path):
    torch.save({"w": torch.ones(2), "more": pickle.dumps(Code(tmp_path / "made"))}, tmp_path / "a.pth")
    assert "holds no state dict" in refused(tmp_path / "a.pth")
    assert not (tmp_path / "made").exists()


def test_the_code_of_these_checkpoints_would_run(tmp_path):
    torch.save(Code(tmp_path / "made"), tmp_path / "a.pth")
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert (tmp_path / "made").exists()


def packed(path: Path, size: int) -> None:
    """A checkpoint of so many zeros, compressed as torch never does."""
    torch.save({"w": torch.zeros(size, dtype=torch.uint8)}, plain := path.with_name("plain.pth"))
    with zipfile.ZipFile(plain) as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small:
        for part in whole.infolist():
            small.writestr(part.filename, whole.read(part))


def test_a_checkpoint_that_unpacks_to_more_than_itself_is_refused_and_a_plain_one_read(tmp_path):
    packed(tmp_path / "a.pth", 2**22)
    assert torch.load(tmp_path / "a.pth")["w"].numel() == 2**22  # torch itself would
    assert re.search(r"its [\d,]+ bytes unpack to 4,19\d,\d+", refused(tmp_path / "a.pth"))
    assert models.tensors_of(tmp_path / "plain.pth")["w"].numel() == 2**22


@pytest.mark.parametrize("archive", [True, False])
def test_a_checkpoint_that_asks_for_more_memory_than_there_is_is_refused(tmp_path, archive):
    torch.save({"w": Room(10**17)}, tmp_path / "a.pth", _use_new_zipfile_serialization=archive)
    assert refused(tmp_path / "a.pth").endswith("MemoryError")


def tensor(shape: list[int], start: int, end: int) -> dict[str, object]:
    """What the header of a safetensors file says of one."""
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


HEADERS: dict[str, bytes | dict] = {
    "overlapping": {"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)},
    "a hole": {"a": tensor([1], 0, 4), "b": tensor([1], 8, 12)},
    "beyond the end": {"a": tensor([300], 0, 1200)},
    "more than its bytes": {"a": tensor([2**40], 0, 12)},
    "more than can be counted": {"a": tensor([2**62, 8], 0, 12)},
    "huge": b"{" + b" " * 100_000_001 + b"}",
    "deep": b'{"__metadata__": {"json": "' + b"[" * 100_000 + b'"}}',
    "no JSON": b'{"__metadata__": {"json": "{"}}',
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_safetensors_file_whose_header_lies_is_refused_in_one_line(tmp_path, header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    held = 0 if isinstance(header, bytes) else 12
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(held))
    refused(tmp_path / "a.safetensors")


def test_a_safetensors_file_whose_header_is_longer_than_any_is_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    assert "header too large" in refused(tmp_path / "a.safetensors")


# Folders that `compress` wrote


@pytest.fixture
def small(tmp_path, make, images) -> Path:
    """A folder of a smaller network."""
    return ur.save(ur.compress(make("residual"), calibration=images, params=0.7), tmp_path / "small")


@pytest.mark.parametrize("kind", ["Module", "DataParallel", "math", "__builtins__", "Sequential.__init__"])
def test_a_folder_gives_layers_of_the_kinds_that_compress_writes_and_of_no_other(small, make, kind):
    layers = json.loads((small / "layers.json").read_text())
    assert ur.load(small, make("residual")) is not None
    layers[next(iter(layers))] = [kind, {}]
    (small / "layers.json").write_text(json.dumps(layers))
    with pytest.raises(ur.InputError, match=rf"no layer is made of a '{re.escape(kind)}'"):
        ur.load(small, make("residual"))


def test_a_folder_does_not_choose_the_function_that_makes_its_network(small, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("import pathlib\npathlib.Path('made').mkdir()\n")
    monkeypatch.chdir(tmp_path)
    done = json.loads((small / "compression.json").read_text())
    (small / "compression.json").write_text(json.dumps(done | {"provenance": {"model": "evil:network"}}))
    with pytest.raises(StudyError, match=r"was made of evil:network, whose code would run: name it with --model"):
        checked(small, None, None, torch.device("cpu"))
    assert not (tmp_path / "made").exists()
    with pytest.raises(StudyError, match="evil:network cannot be made"):
        checked(small, "evil:network", None, torch.device("cpu"))
    assert (tmp_path / "made").exists()  # its user asked for it


# Images, and archives of them


def read_image(path: Path) -> str:
    """What is said of an image that is refused: one line, with its name."""
    with pytest.raises(StudyError) as caught:
        decoded(path, 8, 1.0)
    said = str(caught.value)
    assert said.startswith(f"{path} is not a whole image")
    assert "\n" not in said
    return said


@pytest.mark.parametrize("size", [(10_000, 10_000), (10_000, 20_000)], ids=["100 megapixels", "200 megapixels"])
@pytest.mark.parametrize("kind", ["png", "tif", "bmp"])
def test_an_image_of_a_hundred_megapixels_is_refused_by_its_size(tmp_path, size, kind):
    Image.new("1", size).save(tmp_path / f"a.{kind}", **({"compression": "group4"} if kind == "tif" else {}))
    assert f"{size[0] * size[1]} pixels" in read_image(tmp_path / f"a.{kind}")


def test_an_image_of_fifty_megapixels_is_read(tmp_path):
    Image.new("1", (10_000, 5_000)).save(tmp_path / "a.png")
    assert decoded(tmp_path / "a.png", 8, 1.0).shape == (3, 8, 8)


def test_text_in_an_image_that_grows_beyond_measure_is_refused(tmp_path):
    words = PngImagePlugin.PngInfo()
    words.add_text("comment", "0" * 2**26, zip=True)
    Image.new("L", (8, 8)).save(tmp_path / "a.png", pnginfo=words)
    assert (tmp_path / "a.png").stat().st_size < 2**17
    assert "too large" in read_image(tmp_path / "a.png")


def test_a_program_is_no_image_whatever_it_is_called(tmp_path, monkeypatch):
    run = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: run.append(1))
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(made) (w) file\n"
    )
    assert "cannot identify" in read_image(tmp_path / "a.png")
    assert not run


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
@pytest.mark.parametrize("spoilt", ["train_list", "meta"])
def test_a_batch_of_cifar_with_code_is_not_unpickled(tmp_path, monkeypatch, name, spoilt):
    """Theirs are pickles: they are read where their checksums are those that torchvision knows."""
    kind = getattr(torchvision.datasets, name)

    def out_of_reach(*_) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(kind, "download", out_of_reach)
    folder = tmp_path / "data" / "raw" / kind.base_folder
    folder.mkdir(parents=True)
    content = pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [0], "fine_labels": [0]})
    known = {part: [[its, hashlib.md5(content).hexdigest()] for its, _ in getattr(kind, part)] for part in PARTS}
    for part, listed in known.items():
        monkeypatch.setattr(kind, part, listed)
        for its, _ in listed:
            (folder / its).write_bytes(content)
    (folder / kind.meta["filename"]).write_bytes(content)
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": hashlib.md5(content).hexdigest()})
    file = kind.meta["filename"] if spoilt == "meta" else known[spoilt][0][0]
    (folder / file).write_bytes(pickle.dumps(Code(tmp_path / "made")))
    with pytest.raises(StudyError, match=f"{name} cannot be reached"):
        sources.read(Data(source="torchvision", dataset=name, image_size=32), tmp_path)
    assert not (tmp_path / "made").exists()


PARTS = ("train_list", "test_list")


# Names and paths

OUTSIDE = ["../../etc", "/etc", "..", ".", "", ".hidden", "a/b", "a\\b", "a.b", "a b", "a;b", "$(b)", "`b`", "a\n", "é"]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("section", ["name", "runs", "pretrained", "comparisons", "repeats", "frontier"])
def test_a_name_that_would_lead_out_of_its_folder_or_into_a_command_is_refused(parameters, section, name):
    key = {"name": None, "runs": "vgg11", "pretrained": "simclr_vit", "comparisons": "vit"}.get(section, "new")
    given = parameters.get(section, {})
    parameters[section] = name if key is None else {**given, name: given.get(key, {})}
    with pytest.raises(StudyError, match=rf"(?m)^params\.yaml: {section}") as caught:
        parse_study(parameters)
    assert "should match pattern" in str(caught.value)


@pytest.mark.parametrize("name", ["../../etc", "..", "/etc", "reports/../../outside", "../../outside"])
def test_a_study_is_called_by_its_name_and_by_no_path(tmp_path, monkeypatch, parameters, name):
    root = tmp_path / "project"
    for folder in (root, tmp_path / "outside"):
        (folder / "conf" / "study").mkdir(parents=True)
        (folder / "reports").mkdir()
        (folder / "params.yaml").write_text(json.dumps(parameters))
    monkeypatch.chdir(root)
    assert open_study("toy")[0].name == "toy"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StudyError):
        open_study(name)
    with pytest.raises(StudyError, match="conf/study has no"):
        compose(name, root)
    assert sorted(tmp_path.rglob("*")) == before


CHECKPOINT = {"method": "checkpoint", "supervision": "supervised", "sha256": "00ff", "model": {"architecture": "vit"}}


@pytest.mark.parametrize("file", ["/etc/cron.d/made", "../made", "data/raw/../../../made"])
def test_what_is_downloaded_stays_in_the_project(parameters, file):
    parameters["pretrained"]["simclr_vit"] = CHECKPOINT | {"file": file, "url": "https://example.org/made"}
    with pytest.raises(StudyError, match=rf"file {re.escape(file)} lies outside of the project"):
        parse_study(parameters)
    parameters["pretrained"]["simclr_vit"]["file"] = "data/raw/checkpoints/made"
    parse_study(parameters)


def test_no_other_data_set_is_loaded_by_its_name(parameters):
    parameters["data"] |= {"source": "torchvision", "dataset": "../../etc"}
    with pytest.raises(StudyError, match=r"torchvision has no '\.\./\.\./etc'"):
        parse_study(parameters)


# Pages

HOSTILE = "</script></title></style>--><script>alert(1)</script><img src=x onerror=alert(1)>\"'{{ 7 * 7 }}"


class Tags(HTMLParser):
    """The tags of a page and the names of their attributes, in their order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, ...]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, *(name for name, _ in attrs)))


def pages_of(folder: Path, parameters: dict, word: str) -> dict[str, str]:
    """All pages of a study that is called ``word`` wherever it can be."""
    runs = parameters["runs"]
    parameters["title"], parameters["notes"] = f"title {word}", [f"note {word}"]
    for key in ("vgg11", "vit_linear"):
        runs[key] = runs[key] | {"label": f"{key} {word}"}
    parameters["comparisons"]["vit"]["label"] = f"comparison {word}"
    study, store = toy_study(folder, parameters)
    links = [{"title": f"link {word}", "href": "notebooks/a.html"}]
    record = {"code": word, "device": word, "processor": word, "system": "s", "python": "3", "packages": {word: "2"}}
    found = {"study": index(study, store, links, record)}
    found["overview"] = (reports(study, store, {"toy": f"toys {word}"}) / "index.html").read_text()
    return found


@pytest.mark.parametrize("page", ["study", "overview"])
def test_labels_and_titles_are_text_in_a_page_and_no_tags(tmp_path, parameters, page):
    plain, hostile = (
        pages_of(tmp_path / name, json.loads(json.dumps(parameters)), word)[page]
        for name, word in (("plain", "word"), ("hostile", HOSTILE))
    )
    assert "alert(1)" in hostile  # it is there,
    assert Tags(hostile).found == Tags(plain).found  # and is text
    assert "7 * 7" in hostile


def test_the_tags_of_a_page_would_show_a_label_that_is_none(tmp_path, parameters):
    page = pages_of(tmp_path, parameters, "word")["study"]
    assert Tags(page.replace("title word", HOSTILE, 1)).found != Tags(page).found


def notebook(path: Path) -> None:
    """One whose outputs, as those of a run, hold what others wrote; the last is HTML of its own making."""
    outputs = [
        new_output("stream", text=f"stream {HOSTILE}"),
        new_output("execute_result", data={"text/plain": f"text {HOSTILE}"}),
        new_output("execute_result", data={"text/html": pd.DataFrame({HOSTILE: [HOSTILE]})._repr_html_()}),
        new_output("error", ename="E", evalue=HOSTILE, traceback=[f"error {HOSTILE}"]),
        new_output("display_data", data={"application/javascript": "document.title = 'ran'"}),
        new_output("display_data", data={"text/html": RAN}),
    ]
    cells = [new_markdown_cell("# Title"), new_code_cell("x = '<script>'", outputs=outputs)]
    nbformat.write(new_notebook(cells=cells), path)


RAN = "<p id=last>last</p><script>document.title = 'ran'</script><img src=x onerror=\"document.title = 'ran'\">"


def test_outputs_of_a_notebook_that_are_text_stay_text(tmp_path):
    notebook(tmp_path / "a.ipynb")
    page = pages.notebook_page(tmp_path / "a.ipynb", "Title")
    for words in ("stream", "text", "error"):
        assert f"{words} &lt;/script&gt;" in page
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert "<img src=x onerror=alert" not in page
    (policy,) = re.findall(r"<meta [^>]*Content-Security-Policy[^>]*>", page)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in policy
    assert page.index(policy) < page.index("<style") < page.index("</head>")


@pytest.mark.browser
def test_no_script_of_a_notebooks_output_runs(browser, tmp_path):
    notebook(tmp_path / "a.ipynb")
    page = pages.notebook_page(tmp_path / "a.ipynb", "Title")
    (tmp_path / "a.html").write_text(page)
    (tmp_path / "open.html").write_text(re.sub(r"<meta [^>]*Content-Security-Policy[^>]*>", "", page))
    opened, titles = browser.new_page(), []
    for name in ("a.html", "open.html"):
        opened.goto((tmp_path / name).as_uri())
        assert opened.text_content("#last") == "last"
        titles.append(opened.title())
    assert opened.evaluate("getComputedStyle(document.body).fontFamily") != ""
    opened.close()
    assert titles == ["Title", "ran"]  # without its policy it would


# The network


@pytest.fixture
def asked(monkeypatch) -> list[object]:
    """Hosts that were asked for, none of which answers."""
    hosts: list[object] = []

    def refuse(*asked: object, **_: object) -> None:
        hosts.append(asked)
        raise OSError("no network")

    def refused_unless_local(name: str) -> Callable[..., object]:
        real = getattr(socket.socket, name)
        return lambda its, address: (real if its.family == socket.AF_UNIX else refuse)(its, address)

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refused_unless_local(name))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return hosts


def test_a_host_that_is_asked_for_is_noticed(asked):
    with pytest.raises(OSError, match="no network"):
        urllib.request.urlopen("http://127.0.0.1:9")
    assert asked


def test_the_library_asks_no_network(asked, make, images: Tensor, tmp_path):
    network = make("residual")
    assert 0 < ur.measure(network, calibration=images, energy=0.99).mlu <= 1
    small = ur.compress(network, calibration=images, params=0.7)
    ur.load(ur.save(small, tmp_path / "small"), network)
    assert asked == []


def test_the_command_asks_no_network_where_weights_are_given(asked, tmp_path):
    classes_of(tmp_path / "images", {"a": 6, "b": 6})
    torch.save(models.build(Model(architecture="resnet20", width=1.0), (3, 32, 32), 2).state_dict(), tmp_path / "a.pth")
    given = (tmp_path / "images", tmp_path / "a.pth", tmp_path / "out", torch.device("cpu"), {}, None, 0.99, 6, 6)
    assert "written" in measured("resnet20", *given, "rank", "float32")
    assert asked == []


def test_the_default_study_asks_no_network_for_its_parameters_and_images(asked):
    study, _ = compose("digits", ROOT)
    assert len(sources.read(study.data, ROOT).images) == 1797
    assert asked == []


# What is installed

LOCKS = {"requirements.lock": "constraints.txt", "requirements-oldest.lock": "constraints-oldest.txt"}


@pytest.mark.parametrize("name", LOCKS)
def test_every_release_that_is_locked_has_a_hash_but_torchs(name):
    releases = re.sub(r"\\\n", "", re.sub(r"(?m)^#.*\n", "", (ROOT / name).read_text())).splitlines()
    assert len(releases) > 200
    for line in releases:
        assert re.match(r"[a-z0-9-]+==[^\s;]+ .*--hash=sha256:[0-9a-f]{64}", line), line
        assert not re.match(r"torch(vision)?==", line)
    pinned = re.findall(r"^(\S+)==\S+$", (ROOT / LOCKS[name]).read_text(), re.MULTILINE)
    assert pinned == ["torch", "torchvision"]


def test_the_oldest_torch_is_the_oldest_that_the_project_allows():
    allowed = re.findall(r'"(torch|torchvision)>=(\S+)"', (ROOT / "pyproject.toml").read_text())
    pinned = re.findall(r"^(\S+)==(\S+)\.0$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE)
    assert sorted(pinned) == sorted(allowed)


def test_the_bill_of_materials_is_of_what_is_locked():
    bill = json.loads((ROOT / "sbom.cdx.json").read_text())
    lines = [
        line for name in ("requirements.lock", "constraints.txt") for line in (ROOT / name).read_text().split("\n")
    ]
    locked = [line.split()[0] for line in lines if "==" in line and not line.startswith(("#", " "))]
    assert sorted(f"{its['name']}=={its['version']}" for its in bill["components"]) == sorted(locked)
    assert len({its["bom-ref"] for its in bill["components"]}) == len(locked)
    made = subprocess.run([sys.executable, ROOT / ".ci" / "sbom.py"], capture_output=True, check=True).stdout
    assert made == (ROOT / "sbom.cdx.json").read_bytes()


class Advisories(BaseHTTPRequestHandler):
    """An index of advisories that knows of the packages in ``bad``."""

    bad: frozenset[str] = frozenset()

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = query["package"].get("name")
        known = {"id": "PYSEC-2000-1", "modified": "2000-01-01T00:00:00Z", "details": "bad", "affected": []}
        known["affected"] = [{"package": {"name": name, "ecosystem": "PyPI"}, "versions": [query.get("version")]}]
        answer = json.dumps({"vulns": [known]} if name in self.bad else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def advisories() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Advisories)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def audit(url: str) -> subprocess.CompletedProcess[str]:
    """``make audit`` in the environment of these tests, with that index."""
    given = ["make", "--silent", "--old-file=.venv/ready", f"BIN={Path(sys.executable).parent}", f"ADVISORIES={url}"]
    return subprocess.run([*given, "audit"], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_an_audit_without_a_network_says_so_in_one_line_and_passes():
    found = audit("http://127.0.0.1:9")
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout == "Not audited: the index of advisories, http://127.0.0.1:9, is out of reach.\n"


@pytest.mark.parametrize("bad", ["", "torch", "pillow"])
def test_an_audit_fails_where_something_that_is_locked_is_known_to_be_bad(advisories, monkeypatch, bad):
    pytest.importorskip("pip_audit")
    monkeypatch.setattr(Advisories, "bad", frozenset({bad}))
    found = audit(advisories)
    assert (found.returncode != 0) == bool(bad), found.stderr
    assert not bad or re.search(rf"(?m)^{bad} .*PYSEC-2000-1", found.stdout)
