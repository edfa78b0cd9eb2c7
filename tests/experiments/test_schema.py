"""The page of every key is what the classes say: written again it is the same, and its examples are values that are taken."""

import json
import re
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from experiments import config, schema

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "config.md"


def test_the_page_is_as_the_classes_are():
    assert PAGE.read_text(encoding="utf-8") == schema.page(), (
        "write it again: python -m experiments keys > docs/config.md"
    )


def test_every_key_stands_with_an_example_that_is_taken():
    page = schema.page()
    for name in config.EXPERIMENTS:
        model = config.study(name).Config
        for part in {model, *schema._parts(model)}:
            for key, field in part.model_fields.items():
                example = schema._example(part, key, field)
                assert f"`{key}: {example}`" in page
                if example == "{}":
                    continue
                value = yaml.safe_load(f"x: {example}")["x"]
                try:
                    TypeAdapter(field.annotation).validate_python(value)
                except ValidationError as error:
                    pytest.fail(f"{part.__name__}.{key}: {example}: {error}")
    assert "`wandb: true`" in page


def test_the_schema_for_editors_knows_the_same_keys():
    told = json.loads(schema.json_schema())
    assert told["properties"]["experiment"]["enum"] == list(config.EXPERIMENTS)
    for choice in told["allOf"]:
        model = config.study(choice["if"]["properties"]["experiment"]["const"]).Config
        own = choice["then"]
        assert set(own["properties"]) == {*model.model_fields, "quick"}
        assert own["additionalProperties"] is False
    used = set(re.findall(r'"#/\$defs/([^"]+)"', json.dumps(told)))
    assert used <= set(told["$defs"])
