r"""What is each loss, what does it need and what does it cost? One page from the docstrings of `kdjax.losses`.

    python -m experiments.loss_page --output=docs/losses.md

Takes some seconds. Nothing is run: names, signatures and docstrings are read from the source, and what the page says of
a loss (its formula, needs, result, cost and papers) stands there. A test fails where the page differs from what this
command writes; it also says what a docstring lacks.
"""

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from absl import flags

from experiments import common
from kdjax import files

OUTPUT = flags.DEFINE_string("output", "docs/losses.md", "Page to write.")

ROOT = Path(__file__).resolve().parent.parent
LOSSES = "kdjax/losses"
COMPANIONS = "kdjax.models.heads"
MODULES = ("logits", "features", "relations", "maps", "targets", "regression", "reductions")
SECTIONS = ("Args", "Returns", "Raises", "Cost", "References", "Examples")

HEAD = """# Losses

Made from the docstrings by `python -m experiments.loss_page --output=docs/losses.md`; change those, not this page.

All are functions of `kdjax.losses`: arrays in, the student's first, and out comes one value per **example**, or one
for the **batch** where examples are compared with each other. Weights and means are the caller's. *Known as* is the
short name that comparisons use. *Needs* is of both networks unless it says whose; features are maps or embeddings, and
names in `this` type are of the heads, learnable modules of
[`kdjax.models.heads`](../kdjax/models/heads.py) that usually stand before the loss.

*Cost* is that of the loss and its gradient, without the networks and heads: time first and, where it differs,
the memory of the arrays made on the way, for B examples (the whole batch with `axis_name`), C classes or channels,
P positions, width D, K candidates, M teachers and N examples in the memory.
"""


class Entry(NamedTuple):
    """A public name: where it is, how it is called, and its docstring in parts."""

    name: str
    module: str
    arguments: dict[str, str]  # name to annotation
    returns: str
    summary: str
    known_as: str
    body: str  # between summary and sections
    sections: dict[str, str]

    @property
    def is_loss(self) -> bool:
        """Whether it takes anything of a student; the rest makes what losses take."""
        return any(name.startswith(("student", "generated")) for name in self.arguments)

    @property
    def has_formula(self) -> bool:
        """Whether it has a section of its own."""
        return ".. math::" in self.body


def main() -> None:
    """Writes the page."""
    entries = read(ROOT / LOSSES)
    lacking = [f"{entry.name} lacks {what}" for entry in entries for what in lacks(entry)]
    if lacking:
        raise ValueError("; ".join(lacking))
    files.write_text(OUTPUT.value, page(entries))
    print(f"{OUTPUT.value}: {len(entries)} names.")


def read(package: Path) -> list[Entry]:
    """Every public name, by module, in the order of the source."""
    public = {
        alias.asname: str(node.module).split(".")[-1]
        for node in ast.parse((package / "__init__.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    unknown = set(public.values()) - set(MODULES)
    if unknown:
        raise ValueError(f"no place on the page for {sorted(unknown)}; add them to MODULES.")
    return [
        _entry(node, module)
        for module in MODULES
        for node in ast.parse((package / f"{module}.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and public.get(node.name) == module
    ]


def _entry(node: ast.FunctionDef | ast.ClassDef, module: str) -> Entry:
    summary, _, rest = (ast.get_docstring(node) or "").partition("\n")
    body, *parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", rest, flags=re.MULTILINE)
    known_as = re.search(r"^Known as (.+)\.\n", body, flags=re.MULTILINE)
    arguments, returns = {}, ""
    if isinstance(node, ast.FunctionDef):
        given = [*node.args.args, *node.args.kwonlyargs]
        arguments = {a.arg: ast.unparse(a.annotation) for a in given if a.annotation}
        returns = ast.unparse(node.returns) if node.returns else ""
    return Entry(
        name=node.name,
        module=module,
        arguments=arguments,
        returns=returns,
        summary=summary,
        known_as=known_as[1] if known_as else "",
        body=body.replace(known_as[0], "") if known_as else body,
        sections={
            name: textwrap.dedent(text).strip() for name, text in zip(parts[::2], parts[1::2], strict=True)
        },
    )


def lacks(entry: Entry) -> list[str]:
    """What the page needs of a docstring and does not find."""
    found = {
        "a summary in one sentence": entry.summary.endswith("."),
        "'Cost:' with O(...) time, O(...) memory": entry.returns == "" or cost(entry) != ("", ""),
    }
    if entry.is_loss or entry.has_formula:
        references = re.sub("<.*?>", "", entry.sections.get("References", ""), flags=re.DOTALL)
        found |= {
            "'Returns:'": "Returns" in entry.sections,
            "'References:' with a year": bool(re.search(r"\b(19|20)\d\d\b", references)),
        }
    if entry.is_loss:
        found |= {"a formula (.. math::)": entry.has_formula, "known inputs": bool(needs(entry))}
        whole = " for the batch" in entry.sections.get("Returns", "")
        found["a 'Returns:' that fits its annotation"] = whole == (result(entry) == "batch")
    return [what for what, is_there in found.items() if not is_there]


def page(entries: list[Entry]) -> str:
    """The whole page as Markdown."""
    names = {entry.name: _anchor(entry) for entry in entries}
    lines = [
        "| loss | known as | needs | value per | cost | paper |",
        "| :-- | :-- | :-- | :-- | :-- | :-- |",
    ]
    lines += [_row(entry, names) for entry in entries if entry.is_loss]
    parts = [HEAD, "\n".join(lines)]
    for module in MODULES:
        parts.append(f"## [{module}](../{LOSSES}/{module}.py)")
        here = [entry for entry in entries if entry.module == module]
        parts += [_full(entry, names) for entry in here if entry.has_formula]
        short = [_short(entry, names) for entry in here if not entry.has_formula]
        if short:
            parts += [f"### Beside them in {module}", "\n".join(short)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _anchor(entry: Entry) -> str:
    return entry.name if entry.has_formula else f"beside-them-in-{entry.module}"


def _row(entry: Entry, names: dict[str, str]) -> str:
    time, memory = cost(entry)
    cells = [
        f"[`{entry.name}`](#{names[entry.name]})",
        entry.known_as or "–",
        ", ".join([*needs(entry), *(f"`{name}`" for name in heads(entry))]),
        result(entry),
        time if time == memory else f"{time}; {memory}",
        paper(entry),
    ]
    return "| " + " | ".join(cells) + " |"


def _full(entry: Entry, names: dict[str, str]) -> str:
    wanted = [*needs(entry), *(f"[`{name}`](../kdjax/models/heads.py)" for name in heads(entry))]
    facts = {
        "Known as": entry.known_as,
        "Needs": ", ".join(wanted),
        "Returns": markdown(entry.sections["Returns"], names),
        "Cost": markdown(entry.sections["Cost"], names),
        "Paper": markdown(entry.sections["References"], names),
    }
    return "\n\n".join(
        [
            f"### [`{entry.name}`](../{LOSSES}/{entry.module}.py)",
            markdown(entry.summary, names),
            *_blocks(entry.body, names),
            "\n".join(f"- **{what}**: {said}" for what, said in facts.items() if said),
        ]
    )


def _short(entry: Entry, names: dict[str, str]) -> str:
    parts = [f"- `{entry.name}`: {markdown(entry.summary, names)}"]
    if "Cost" in entry.sections:
        parts.append(f"Cost: {markdown(entry.sections['Cost'], names)}")
    if "References" in entry.sections:
        parts.append(f"Paper: {markdown(entry.sections['References'], names)}")
    return " ".join(parts)


def needs(entry: Entry) -> list[str]:
    """What kinds of arrays it takes, and of whom where that is not both: from names and axes of its arguments."""
    whose: dict[str, set[str]] = {}
    for name, annotation in entry.arguments.items():
        kind = _kind(name, annotation)
        if kind:
            owner = re.match("student|generated|teacher", name)
            whose.setdefault(kind, set()).add(owner[0].replace("generated", "student") if owner else "")
    return [
        kind if owners >= {"student", "teacher"} or owners == {""} else f"{min(owners - {''})} {kind}"
        for kind, owners in whose.items()
    ]


def _kind(name: str, annotation: str) -> str:
    """A plural for one argument; nothing for settings."""
    if annotation.startswith("Scalar") or not re.search(r"Array|Memory", annotation):
        return ""
    dtype, axes = (re.findall(r"(Float|Int|Bool|Key)\[Array, '([^']*)'\]", annotation) or [("", "")])[0]
    last = axes.split()[-1] if axes else ""
    if "Memory" in annotation:
        return "memory"
    if name == "key" or dtype == "Key":
        return "a random key"
    if dtype == "Int":
        return {"k": "top k", "candidates": "candidates"}.get(last, name)
    for word, kind in {"logits": "logits", "gradient": "input gradients", "weights": "weights"}.items():
        if word in name:
            return kind
    if last == "classes":
        return "probabilities"
    if last == "k":
        return "top k"
    if last.endswith("_features"):
        return "features"
    if last == "dims":
        return "embeddings"
    if last == "outputs":
        return "labels" if name == "targets" else "outputs"
    if last.endswith("positions"):
        return "flat maps"
    return "maps" if "height" in axes and dtype == "Float" else name.replace("_", " ")


def heads(entry: Entry) -> list[str]:
    """The learnable modules that its docstring names."""
    text = entry.body + "".join(entry.sections.values())
    return list(dict.fromkeys(re.findall(rf":class:`{COMPANIONS}\.(\w+)`", text)))


def result(entry: Entry) -> str:
    """What there is one value for, from the annotation of the result."""
    axes = re.search(r"Float\[Array, '([^']*)'\]", entry.returns)
    return {"": "batch", "*batch": "example", "batch": "example"}.get(axes[1].strip(), "") if axes else ""


def cost(entry: Entry) -> tuple[str, str]:
    """Time and memory, without what the docstring adds to them; empty where it does not say."""
    said = re.match(r"(O\(.+?\)) time, (O\(.+?\)) memory\b", entry.sections.get("Cost", ""), flags=re.DOTALL)
    return (said[1], said[2]) if said else ("", "")


def paper(entry: Entry) -> str:
    """First author and year of the first reference, linked where it is."""
    text = " ".join(entry.sections["References"].split())
    plain = re.sub("<.*?>", "", text)
    author, year = text.split(",")[0].removesuffix(" et al."), re.search(r"\b(?:19|20)\d\d\b", plain)
    label = f"{author} {year[0] if year else ''}"
    first = text.split(year[0])[0] if year and not re.search(rf"<[^>]*{year[0]}", text) else text
    link = re.search("<(http.*?)>", first)
    return f"[{label}]({link[1]})" if link else label


def _blocks(text: str, names: dict[str, str]) -> Iterator[str]:
    """Paragraphs, formulas and code of a docstring, one after the other."""
    code: list[str] = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        if code and block.startswith("    "):
            code.append(textwrap.dedent(block))
            continue
        if len(code) > 1:
            yield "```python\n" + "\n\n".join(code[1:]) + "\n```"
        code = []
        if block.startswith(".. math::"):
            formula = block.removeprefix(".. math::").split("\n")
            yield "```math\n" + "\n".join(line.strip() for line in formula) + "\n```"
        elif block.strip() == "::":
            code = ["::"]
        elif block.strip():
            yield markdown(block, names)
    if len(code) > 1:
        yield "```python\n" + "\n\n".join(code[1:]) + "\n```"


def markdown(text: str, names: dict[str, str]) -> str:
    """Roles, links and literals of reStructuredText in Markdown; a list keeps its lines, other text becomes one."""

    def role(match: re.Match[str]) -> str:
        what, target = match.groups()
        name = target.lstrip("~").split(".")[-1]
        if what == "math":
            return f"$`{target}`$"
        if target.startswith(f"{COMPANIONS}."):
            return f"[`{name}`](../kdjax/models/heads.py)"
        return f"[`{name}`](#{names[name]})" if name in names else f"`{target.lstrip('~')}`"

    lines = [" ".join(line.split()) for line in re.split(r"\n(?=- )", text)]
    text = "\n".join(lines)
    text = re.sub(r":(\w+):`([^`]+)`", role, text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    text = re.sub(r"`([^`<>]+) <([^>]+)>`_", r"[\1](\2)", text)
    return re.sub(r"(\$`.*?`\$)|\\\|", lambda match: match[1] or "|", text)  # in a formula it is a norm


if __name__ == "__main__":
    common.launch(main)
