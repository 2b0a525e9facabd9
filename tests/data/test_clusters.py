"""Which subjects are one cluster."""

import pandas as pd

from lssl.data.clusters import subject_clusters


def test_the_coarsest_column_counts_and_a_single_site_divides_nothing():
    table = pd.DataFrame({"subject": ["a", "a", "b", "c", "d"]})
    assert subject_clusters(table) == {}
    family = table.assign(family=["f", "f", "f", None, ""])
    assert subject_clusters(family) == {"a": "f", "b": "f"}
    assert subject_clusters(family.assign(site="here")) == {"a": "f", "b": "f"}
    maps = table.assign(family=list("11234"), map=list("xxxyy"))
    assert subject_clusters(maps) == {"a": "x", "b": "x", "c": "y", "d": "y"}
    assert set(subject_clusters(table.assign(map="only")).values()) == {"only"}
