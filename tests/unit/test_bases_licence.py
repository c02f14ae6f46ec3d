"""Licences: hub ids to SPDX, model cards, licence files."""

from pathlib import Path

import pytest

from haori.bases.licence import licence_of_folder, to_spdx


@pytest.mark.parametrize(
    ("raw", "spdx"),
    [
        ("apache-2.0", "Apache-2.0"),
        ("mit", "MIT"),
        ("cc-by-nc-4.0", "CC-BY-NC-4.0"),
        ("llama3.1", "LicenseRef-scancode-llama-3.1-license-2024"),
        ("Gemma", "LicenseRef-scancode-gemma-tou-2024-04-01"),
        ("creativeml-openrail-m", "LicenseRef-creativeml-openrail-m"),
        ("My own / terms", "LicenseRef-My-own-terms"),
        ("other", None),
        ("unknown", None),
        ("", None),
    ],
)
def test_hub_ids_become_spdx(raw: str, spdx: str | None) -> None:
    assert to_spdx(raw) == spdx


def test_mapped_licences_are_in_the_index() -> None:
    import license_expression

    from haori.bases.licence import _HUB_IDS

    for name in filter(None, _HUB_IDS.values()):
        assert str(license_expression.get_spdx_licensing().parse(name, validate=True)) == name


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n# Model\n", "Apache-2.0"),
        ("---\r\nlicense: mit\r\n---\r\n", "MIT"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "MIT AND Apache-2.0"),
        ("---\nlicense: other\nlicense_name: qwen-research\n---\n", "LicenseRef-qwen-research"),
        ("---\nlicense: {a: 1}\n---\n", None),
        ("---\nlicense: [\n---\n", None),
        ("# Model\nlicense: mit\n", None),
        ("\ufeff---\nlicense: mit\n---\n", "MIT"),
    ],
)
def test_model_cards(tmp_path: Path, card: str, licence: str | None) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    assert licence_of_folder(tmp_path) == licence


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("          Apache License\n    Version 2.0, January 2004", "Apache-2.0"),
        ("Copyright X\n\nPermission is hereby granted, free of charge, to any person", "MIT"),
        ("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT", "LicenseRef-scancode-llama-3.2-license-2024"),
        ("// SPDX-License-Identifier: BSD-3-Clause", "BSD-3-Clause"),
        ("All rights reserved.", None),
    ],
)
def test_licence_files(tmp_path: Path, text: str, licence: str | None) -> None:
    (tmp_path / "LICENSE.txt").write_text(text)
    assert licence_of_folder(tmp_path) == licence


def test_the_card_comes_first(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "LICENSE").write_text("Apache License\nVersion 2.0")
    assert licence_of_folder(tmp_path) == "MIT"
    (tmp_path / "README.md").write_bytes(b"---\n\xff\xfe")
    assert licence_of_folder(tmp_path) == "Apache-2.0"
