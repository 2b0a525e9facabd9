"""Clusters of subjects: subjects of one family, label map or site are not independent."""

from __future__ import annotations

import pandas as pd

__all__ = ["CLUSTER_COLUMNS", "subject_clusters"]

#: Columns of a visit table that name a cluster.
CLUSTER_COLUMNS = ("cluster", "family", "map", "site")


def subject_clusters(table: pd.DataFrame) -> dict[str, str]:
    """Subject → cluster, for statistics over subjects.

    The column of :data:`CLUSTER_COLUMNS` with the fewest different values defines the clusters, as the coarsest. A
    single site is the studied population, so it is no cluster. A subject without a value is its own cluster and is
    omitted.

    Args:
        table: one row per visit, with ``subject``.
    """
    known = [name for name in CLUSTER_COLUMNS if name in table and table[name].nunique() > (name == "site")]
    if not known:
        return {}
    column = min(known, key=lambda name: table[name].nunique())
    first = table.dropna(subset=[column]).drop_duplicates("subject")
    return {
        str(subject): str(value)
        for subject, value in zip(first["subject"], first[column], strict=True)
        if str(value).strip()
    }
