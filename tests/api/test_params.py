from __future__ import annotations

import pytest

from omnilmm.api.params import spell


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ((), None),
        (("n",), "n"),
        (("messages", 0, "content", 1, "image_url", "url"), "messages[0].content[1].image_url.url"),
        (("logit_bias", "50256"), "logit_bias.50256"),
        (("metadata", "a name with spaces"), "metadata"),
        (("metadata", "x" * 65), "metadata"),
        (("metadata", "\x1b[31m"), "metadata"),
        (("metadata", ""), "metadata"),
        (("not\nplain",), None),
    ],
)
def test_a_path_is_spelled_up_to_the_first_name_that_is_not_plain(path, text):
    assert spell(path) == text
