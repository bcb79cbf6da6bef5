"""Under which licences the training images lie, as far as the manifest records them."""

from pathlib import Path

from pipeline.data import database

LICENSES = """
SELECT coalesce(nullif(trim(license), ''), 'not recorded') AS license, count(*) AS n
FROM images JOIN selection USING (image_id)
WHERE status = 'ok' AND keep AND split = 'train' GROUP BY 1 ORDER BY n DESC, 1
"""


def licenses(data: Path) -> dict[str, int]:
    """Licence -> training images under it, the most frequent first."""
    return dict(database.connect(data).execute(LICENSES).fetchall())
