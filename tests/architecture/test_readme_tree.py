"""The tree printed in the README names every room that exists, so nobody looks for one that is not on the map."""

from __future__ import annotations

from sources import PACKAGES, ROOT, Source, house


def rooms(sources: tuple[Source, ...]) -> set[str]:
    """The packages, their folders (with a slash) and the files right inside omnilmm."""
    found = {f"{package}/" for package in PACKAGES}
    for source in sources:
        package, *inner = source.path.split("/")
        if len(inner) > 1:
            found.add(f"{inner[0]}/")
        elif package == "omnilmm" and inner[0] != "__init__.py":
            found.add(inner[0])
    return found


def missing(readme: str, sources: tuple[Source, ...]) -> set[str]:
    """Rooms that no line of a code block in the README begins with or names."""
    tree = {word for block in readme.split("```")[1::2] for word in block.replace(",", " ").split()}
    return rooms(sources) - tree


def test_the_readme_names_every_room() -> None:
    assert missing((ROOT / "README.md").read_text(encoding="utf-8"), house()) == set()


def test_a_room_left_out_is_found() -> None:
    sources = tuple(Source.parse(path, "") for path in ("omnilmm/flow.py", "omnilmm/image/source.py"))
    readme = "image/ in prose\n```\nomnilmm/\n  flow.py  the one choreography\ndeployments/\ncluster/\n```\n"
    assert missing(readme, sources) == {"image/"}
    assert missing(readme.replace("flow.py  ", "image/\n  flow.py  "), sources) == set()
