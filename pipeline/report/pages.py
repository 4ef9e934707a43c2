"""From a template in this folder to a page. Undefined names are errors, and text cannot become markup."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline.report import words


def page(template: str, **values: Any) -> str:
    """The HTML that a template makes of `values`."""
    environment = Environment(
        loader=PackageLoader("pipeline.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": words.percent, "span": words.span}
    environment.globals |= {"points": words.points}
    return environment.get_template(template).render(**values)
