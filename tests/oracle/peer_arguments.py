#!/usr/bin/env python3
"""Lists the arguments of another tool's training command, from its wheels, for tests/golden/peers.

    peer_arguments.py NAME PACKAGE.whl... > tests/golden/peers/NAME.tsv

Nothing is imported: the dataclasses are read as text, so that no wheel's dependencies are needed. A line has the name of an
argument and its default, which is empty where it is none, or is only known when the tool runs. Where a package is given in
several versions, arguments that only an older one has are listed as well: the tools allow several, and users' files keep names.
"""

import ast
import sys
import zipfile

# Of a tool, the classes whose fields its command takes, and where each name is looked for: a class of another package may
# have the same name.
TOOLS = {
    "ms-swift": ["swift/arguments/rlhf_args.py:RLHFArguments"],
    "llama-factory": [
        "llamafactory/hparams/model_args.py:ModelArguments",
        "llamafactory/hparams/data_args.py:DataArguments",
        "llamafactory/hparams/training_args.py:TrainingArguments",
        "llamafactory/hparams/finetuning_args.py:FinetuningArguments",
        "llamafactory/hparams/generating_args.py:GeneratingArguments",
    ],
    "trl": [
        "trl/scripts/utils.py:ScriptArguments",
        "trl/trainer/dpo_config.py:DPOConfig",
        "trl/trainer/model_config.py:ModelConfig",
        "trl/scripts/utils.py:DatasetMixtureConfig",
    ],
}


def sources(wheel):
    """The modules of a wheel, by path, as trees."""
    with zipfile.ZipFile(wheel) as files:
        names = [n for n in files.namelist() if n.endswith(".py")]
        wanted = ("arg", "config", "mixin", "utils")
        return {n: ast.parse(files.read(n)) for n in names if any(w in n.rsplit("/", 1)[1] for w in wanted)}


class Classes:
    """The classes of some wheels, by the way they are imported."""

    def __init__(self, wheels):
        self.trees = {}
        for wheel in wheels:
            self.trees.update(sources(wheel))
        self.made = {}

    def find(self, name, beside):
        """Path of the module that has a class, as the module `beside` sees it."""
        def has(path):
            tree = self.trees.get(path)
            return tree and any(isinstance(n, ast.ClassDef) and n.name == name for n in tree.body)

        tree = self.trees[beside]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self.imported(alias.name, node, beside)
        return (beside, name) if has(beside) else None

    def imported(self, name, node, beside):
        folder = beside.split("/")[: -node.level] if node.level else []
        base = "/".join(folder + (node.module or "").split(".")).strip("/")
        near = [p for p in self.trees if p == base + ".py" or p.startswith(base + "/")]
        # A package hands on what its modules have, and transformers what is anywhere in it.
        top = [p for p in self.trees if p.startswith(base.split("/")[0] + "/")]
        for path in near + top:
            if any(isinstance(n, ast.ClassDef) and n.name == name for n in self.trees[path].body):
                return path, name
        return None

    def make(self, path, name):
        """A class of this name with the fields of its text, and bases made likewise: Python finds the order of inheritance."""
        key = (path, name)
        if key in self.made:
            return self.made[key]
        node = next(n for n in self.trees[path].body if isinstance(n, ast.ClassDef) and n.name == name)
        bases = []
        for base in node.bases:
            found = self.find(base.id, path) if isinstance(base, ast.Name) else None
            if found:
                bases.append(self.make(*found))
        fields = {}
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                kind = ast.unparse(statement.annotation)
                if not kind.startswith("ClassVar") and not without_init(statement.value):
                    fields[statement.target.id] = default(statement.value)
        self.made[key] = type(name, tuple(bases) or (object,), {"own": fields})
        return self.made[key]


def without_init(value):
    return isinstance(value, ast.Call) and any(
        k.arg == "init" and getattr(k.value, "value", True) is False for k in value.keywords
    )


def default(value):
    """A default as it would be written on a command line; empty for none, and for one that is computed."""
    if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "field":
        given = {k.arg: k.value for k in value.keywords}
        if "default" in given:
            return default(given["default"])
        factory = given.get("default_factory")
        return default(factory.body) if isinstance(factory, ast.Lambda) else ""
    try:
        value = ast.literal_eval(value) if value is not None else None
    except ValueError:
        # A member of an enumeration is written as its name.
        return value.attr.lower() if isinstance(value, ast.Attribute) else ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return " ".join(str(v) for v in value)
    return "" if value is None else str(value)


def main():
    tool, wheels = sys.argv[1], sys.argv[2:]
    versions = {}
    for wheel in wheels:
        versions.setdefault(wheel.rsplit("/", 1)[-1].split("-")[0], []).append(wheel)
    fields = {}
    # Every package's first wheel says what the defaults are; the others add names.
    for turn in range(max(len(v) for v in versions.values())):
        classes = Classes([v[min(turn, len(v) - 1)] for v in versions.values()])
        for entry in TOOLS[tool]:
            path, name = entry.split(":")
            if path not in classes.trees:
                continue
            for made in reversed(classes.make(path, name).__mro__):
                for field, value in vars(made).get("own", {}).items():
                    if turn == 0 or field not in fields:
                        fields[field] = value
    print("# " + " ".join(w.rsplit("/", 1)[-1].removesuffix("-py3-none-any.whl") for w in wheels))
    for field in sorted(f for f in fields if not f.startswith("_")):
        print(f"{field}\t{fields[field]}".rstrip("\t"))


if __name__ == "__main__":
    main()
