#!/usr/bin/env python3
"""A preprocessor of mdbook: gives chapters that lie outside of docs/ their places in the book, and points links there.

In the repository a link is a path between files, and stays one. In the book, pages of docs/ are at the top and other files where the repository has
them; a link to a file that is no chapter becomes its text, but for the source of plugin-api, whose reference `tools/book` puts beside the book.
"""
import json, posixpath, re, sys

REFERENCE = {"plugin-api/src/lib.rs": "api/dpo_plugin_api/index.html"}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def in_book(path):
    """Where the book has a file of the repository."""
    return re.sub(r"(^|/)README\.md$", r"\1index.md", path.removeprefix("docs/"))


def chapters(items):
    for chapter in (item["Chapter"] for item in items if "Chapter" in item):
        yield chapter
        yield from chapters(chapter["sub_items"])


def pointed(text, own, known):
    """The text with its links as the book has them; `own` is the page's path in the repository."""
    def place(found):
        mark, words, link = found.groups()
        path, hash, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:") or not path: return found[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(own), path))
        beside = file.startswith("docs/") and not file.endswith(".md")  # mdbook copies what is no page
        if mark or beside or file in known or file in REFERENCE:
            there = REFERENCE.get(file, in_book(file))
            return f"{mark}[{words}]({posixpath.relpath(there, posixpath.dirname(in_book(own)) or '.')}{hash}{anchor})"
        return words
    blocks = re.split(r"(^```.*?^```$)", text, flags=re.S | re.M)
    return "".join(block if block.startswith("```") else LINK.sub(place, block) for block in blocks)


if len(sys.argv) > 1:  # `supports html`
    sys.exit(0)
context, book = json.load(sys.stdin)
items = book.get("items", book.get("sections"))
pages = [chapter for chapter in chapters(items) if chapter["path"]]
own = {id(chapter): posixpath.normpath(posixpath.join("docs", chapter["path"])) for chapter in pages}
for chapter in pages:
    path = own[id(chapter)]
    chapter["content"] = pointed(chapter["content"], path, set(own.values()))
    chapter["path"] = in_book(path)
json.dump(book, sys.stdout)
