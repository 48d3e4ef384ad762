"""Fetches real text, more than 300 MB of it, from packages of Debian: documentation, manuals, dictionaries, books.

    python scripts/fetch_corpus.py corpus [--only=manuals] [--keep_packages]
    llmos prepare --config=experiments/prepare.py:data=corpus/books+corpus/documentation+corpus/manuals+corpus/dictionaries \
        --workdir=datasets/debian

Needs apt-get and dpkg-deb (Debian or Ubuntu, after `apt-get update`); nothing is installed. What lies in `corpus`:

    documentation/PACKAGE/...html   as the packages have it
    manuals/LANGUAGE.jsonl.zst      manual pages, one a line, without their markup; the language of each as metadata
    dictionaries/NAME.jsonl.zst     entries in alphabetical order, some kilobytes a line
    books/...                       HTML and text
Files that are there are not fetched again. Licences are in the packages' copyright files: corpus/copyright/PACKAGE.
"""

import argparse
import gzip
import html
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import tqdm
import zstandard

LANGUAGES = ("de", "es", "fr", "it", "ja", "pl", "pt-br", "ru", "zh")
PACKAGES = {
    "manuals": ["manpages", "manpages-dev", "glibc-doc", "perl-doc", "git-man", "tcl8.6-doc",
                *(f"manpages-{language}" for language in LANGUAGES)],
    "dictionaries": ["dict-gcide", "dict-wn", "dict-foldoc", "dict-jargon", "dict-vera", "dict-freedict-deu-eng",
                     "wordnet-base"],
    "documentation": ["linux-doc-6.1", "python3.11-doc", "openjdk-17-doc", "libboost1.81-doc", "postgresql-doc-15",
                      "apache2-doc", "git-doc", "libreoffice-help-de", "libreoffice-help-es", "libreoffice-help-fr",
                      "libreoffice-help-ru", "libreoffice-help-en-us"],
    "books": ["anarchism", "debian-reference-en", "debian-reference-de", "developers-reference", "debian-handbook", "fortunes",
              "fortunes-de", "miscfiles", "doc-debian", "maint-guide"],
}  # fmt: skip
_ENTRY_CHARACTERS = 4000
# Escapes of troff that stand for characters, and those that change fonts, sizes and widths.
_CHARACTERS = {"-": "-", "e": "\\", "&": "", "~": " ", " ": " ", "0": " ", "|": "", "^": "", ",": "", "/": "", "%": "", ":": "",
               "(bu": "•", "(co": "©", "(em": "—", "(en": "–", "(dq": '"', "(aq": "'", "(lq": "“", "(rq": "”", "(ti": "~",
               "(ha": "^", "(ga": "`", "(oq": "‘", "(cq": "’", "(->": "→", "(<=": "≤", "(>=": "≥",
               "(+-": "±", "(mu": "×"}  # fmt: skip
_ESCAPE = re.compile(r"\\(f\[[^]]*\]|f\(..|f.|s[-+]?\d+|\*\[[^]]*\]|\*\(..|\*.|\[[^]]*\]|\(..|[hvwz]'[^']*'|.)")


def main():
    """Fetches what is missing, and says how much there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--only", choices=sorted(PACKAGES))
    parser.add_argument("--keep_packages", action="store_true", help="leave the .deb files in DIRECTORY/packages")
    options = parser.parse_args()
    for kind, packages in PACKAGES.items():
        if options.only in (None, kind):
            for package in tqdm.tqdm(packages, desc=kind):
                fetch(kind, package, options.directory)
    if not options.keep_packages:
        shutil.rmtree(options.directory / "packages", ignore_errors=True)
    for kind in PACKAGES:
        files = [file for file in (options.directory / kind).rglob("*") if file.is_file()]
        print(f"{kind:>16}: {len(files):,} files, {sum(file.stat().st_size for file in files) / 1e6:,.1f} MB")


def fetch(kind, package, directory):
    """Downloads one package, unless it is done, and lays its text where it belongs."""
    done = directory / "copyright" / package
    if done.exists():
        return
    debs = directory / "packages"
    debs.mkdir(parents=True, exist_ok=True)
    run = subprocess.run(["apt-get", "download", package], cwd=debs, capture_output=True, text=True)
    found = sorted(debs.glob(f"{package}_*.deb"))
    if run.returncode or not found:
        sys.exit(f"apt-get download {package} failed: {run.stderr.strip()}\nRun apt-get update first.")
    with tempfile.TemporaryDirectory(dir=debs) as unpacked:
        subprocess.run(["dpkg-deb", "-x", found[-1], unpacked], check=True)
        root = pathlib.Path(unpacked)
        {"manuals": _manuals, "dictionaries": _dictionaries, "documentation": _pages, "books": _pages}[kind](
            root, package, directory / kind
        )
        copyright_file = root / "usr/share/doc" / package / "copyright"
        done.parent.mkdir(exist_ok=True)
        done.write_bytes(copyright_file.read_bytes() if copyright_file.is_file() else b"")


def _pages(root, package, target):
    """HTML and plain text, as they are."""
    for file in sorted(root.rglob("*")):
        name = file.name.removesuffix(".gz")
        if not file.is_file() or file.is_symlink() or name in ("copyright", "changelog.Debian", "changelog"):
            continue
        is_text = name.endswith((".html", ".htm", ".txt")) or "fortunes" in file.parts or "dict" in file.parts
        if not is_text or name.endswith((".dat", ".u8")) or _is_binary(file):
            continue
        copy = target / package / file.relative_to(root / "usr")
        if "." not in name:
            copy = copy.with_name(f"{name}.txt" + file.name.removeprefix(name))
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def _is_binary(file):
    with gzip.open(file) if file.name.endswith(".gz") else open(file, "rb") as stream:
        return b"\0" in stream.read(4096)


def _manuals(root, package, target):
    """Manual pages and POD, without markup, by language."""
    pages = {}
    for file in sorted(root.glob("usr/share/man/**/*.gz")):
        if file.is_symlink():
            continue
        parts = file.relative_to(root / "usr/share/man").parts
        language = "en" if parts[0].startswith("man") else parts[0]
        source = gzip.decompress(file.read_bytes()).decode("utf-8", "replace")
        text = plain_manual(source)
        if text.strip():
            pages.setdefault(language, []).append({"text": text, "language": language, "page": file.name.removesuffix(".gz")})
    for file in sorted(root.rglob("*.pod")):
        pages.setdefault("en", []).append({"text": file.read_text("utf-8", "replace"), "language": "en", "page": file.name})
    for language, records in pages.items():
        _write(target / f"{package}-{language}.jsonl.zst", records)


def plain_manual(source):
    """Returns the text of a manual page in troff: headings and paragraphs without their macros."""
    lines = []
    for line in source.replace("\\\n", "").split("\n"):
        if line.startswith(
            ("'\\\"", '.\\"', "'''", ".ig", ".de", ".ds", ".nr", ".if", ".ie", ".el", ".ft", ".TH", ".so", "..")
        ):
            continue
        if line.startswith((".", "'")):
            macro, _, rest = line[1:].lstrip().partition(" ")
            text = re.sub(r'"([^"]*)"', r"\1", rest)
            if macro in ("SH", "SS", "Sh", "Ss"):
                lines += ["", text, ""]
            elif macro in ("PP", "P", "LP", "TP", "IP", "HP", "Pp", "sp", "TQ"):
                lines += ["", text] if macro in ("IP",) and text else [""]
            elif text and macro not in ("in", "ad", "hy", "ta", "nh", "ne", "RS", "RE", "TS", "TE", "PD"):
                lines.append(rest.replace('"', "") if len(macro) == 2 else text)
            continue
        lines.append(line)
    text = _ESCAPE.sub(_character, "\n".join(lines))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _character(match):
    name = match.group(1)
    if name.startswith("[") and name[1:-1].startswith("u") and len(name) >= 7:
        try:
            return chr(int(name[2:-1].split("_")[0], 16))
        except ValueError:
            return ""
    name = f"({name[1:-1]}" if name.startswith("[") else name
    return _CHARACTERS.get(name, "")


def _dictionaries(root, package, target):
    """Dictionaries of dictd, and WordNet's glosses, some entries a record."""
    for file in sorted(root.rglob("*.dict.dz")):
        text = gzip.decompress(file.read_bytes()).decode("utf-8", "replace")
        _write(target / f"{file.name.removesuffix('.dict.dz')}.jsonl.zst", _grouped(re.split(r"\n(?=\S)", text)))
    for file in sorted(root.rglob("data.*")):
        lines = [line for line in file.read_text("utf-8", "replace").splitlines() if line[:1].isdigit()]
        _write(target / f"wordnet-{file.suffix[1:]}.jsonl.zst", _grouped(map(_gloss, lines)))


def _gloss(line):
    fields, _, gloss = line.partition(" | ")
    words = fields.split(" ")
    names = ", ".join(word.replace("_", " ") for word in words[4 : 4 + 2 * int(words[3], 16) : 2])
    return f"{names}: {gloss.strip()}"


def _grouped(entries):
    group, size = [], 0
    for entry in entries:
        group.append(html.unescape(entry))
        size += len(entry)
        if size >= _ENTRY_CHARACTERS:
            yield {"text": "\n".join(group)}
            group, size = [], 0
    if group:
        yield {"text": "\n".join(group)}


def _write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as raw, zstandard.ZstdCompressor(level=3).stream_writer(raw) as packed:
        for record in records:
            packed.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


if __name__ == "__main__":
    main()
