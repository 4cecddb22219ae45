#!/usr/bin/env python3
"""Follows every link of a built book, to files and to places in them.

Usage: book_check.py FOLDER     (the reference of plugin-api, in FOLDER/api, is rustdoc's, and is only linked to)
Exits 1 where a link leads nowhere.
"""
import html.parser, pathlib, sys, urllib.parse


class Page(html.parser.HTMLParser):
    def __init__(self, file):
        super().__init__()
        self.places, self.links = set(), []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.places.add(attributes.get("id"))
        self.links += [link for name in ("href", "src") if (link := attributes.get(name))]


root = pathlib.Path(sys.argv[1])
files = [file for file in root.rglob("*.html") if root / "api" not in file.parents and file.name != "404.html"]
pages = {file.resolve(): Page(file) for file in files}
lost = []
for file, page in pages.items():
    for link in page.links:
        parts = urllib.parse.urlsplit(link)
        if parts.scheme or parts.netloc: continue
        to = (file.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else file
        place = urllib.parse.unquote(parts.fragment)
        if not to.exists() or (place and to in pages and place not in pages[to].places): lost.append(f"{file.relative_to(root.resolve())}: {link}")
print("\n".join(lost) or f"{sum(len(page.links) for page in pages.values())} links of {len(pages)} pages lead somewhere")
sys.exit(bool(lost))
