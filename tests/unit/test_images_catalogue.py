"""Which adapters a base lists, and by which names: stored ones by version and promotion, mounted ones by file."""

from typing import Any

import pytest

from haori.bases.diffusion import pipeline_of
from haori.core.errors import LibraryError
from haori.images.adapters import PictureAdapters
from haori.images.catalogue import Catalogue
from haori.library import Library, import_adapter
from tests.lora_files import kohya_file
from tests.picture_server import CHANGED, tiny_base, write_lora


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: Any) -> tuple[Library, Catalogue]:
    """A library with two versions of `smile` and one `ink`, and a tree with files of two kinds of base."""
    folder = tmp_path_factory.mktemp("shelf")
    base = tiny_base(folder)
    parts = {"unet": pipeline_of(base, dtype="fp32", device="cpu").unet}
    library = Library(folder / "library")
    for seed, name in enumerate(("smile", "smile", "ink"), 1):
        file = write_lora(folder / f"{seed}.safetensors", parts, seed, 0.05, names=CHANGED[:2])
        import_adapter(file, base, name=name, library=library)
    tree = folder / "Lora"
    kohya_file(tree / "ink.safetensors")
    kohya_file(tree / "a" / "same.safetensors", seed=1)
    kohya_file(tree / "b" / "same.safetensors", seed=2)
    kohya_file(tree / "of_xl.safetensors", context=2048)
    (tree / "broken.safetensors").write_bytes(b"no tensors")
    library.mounts.add(tree)
    return library, Catalogue(PictureAdapters(parts, base, library=library), "sd15")


def names(catalogue: Catalogue) -> dict[str, str]:
    return {listing.path: listing.name for listing in catalogue.listings()}


def test_each_is_listed_by_a_name_that_means_it_alone(shelf):
    library, catalogue = shelf
    assert names(catalogue) == {
        "library/ink@1": "ink",  # a stored one goes first
        "library/smile@2": "smile",
        "Lora/ink.safetensors": "Lora/ink",
        "Lora/a/same.safetensors": "Lora/a/same",
        "Lora/b/same.safetensors": "Lora/b/same",
    }
    for listing in catalogue.listings():
        if listing.category:
            assert library.get(listing.name).path.parent.name == listing.category


def test_a_promoted_version_is_the_one_that_is_listed(shelf):
    library, catalogue = shelf
    library.promote("smile@1")
    assert "library/smile@1" in names(catalogue) and catalogue.names_of("smile") == ("smile@1",)
    library.rollback("smile")


def test_a_preview_comes_from_beside_the_file_alone(shelf, tmp_path):
    library, catalogue = shelf
    tree = library.root.parent / "Lora"
    (tree / "ink.png").write_bytes(b"picture")
    catalogue.refresh()
    assert catalogue.preview("Lora/ink").content == b"picture"
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    (tree / "ink.png").unlink()
    (tree / "ink.png").symlink_to(secret)
    with pytest.raises(LibraryError, match="preview"):
        catalogue.preview("Lora/ink")
    with pytest.raises(LibraryError, match="no preview"):
        catalogue.preview("smile")
