"""What `mkdocs build` calls: generated pages go into the site, and nothing is written into docs/."""

from __future__ import annotations

import logging

import composition_pages
import method_pages
import reference_pages
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

for name in ("torch", "torchao"):  # what they log about themselves is no warning of the build
    logging.getLogger(name).setLevel(logging.ERROR)


def generated() -> dict[str, str]:
    """Return all generated pages by their path under docs/."""
    return {**method_pages.pages(), **composition_pages.pages(), **reference_pages.pages()}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the generated pages into the navigation, after those of docs/."""
    tables = {"What goes with what": ["composition.md", *composition_pages.navigation()]}
    methods = {"Methods": [*method_pages.navigation(), tables]}
    config.nav = [*(config.nav or []), methods, {"Reference": reference_pages.navigation()}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for path, text in generated().items():
        files.append(File.generated(config, path, content=text))
    return files
