"""A pair of visits of the endless stream, made from one number."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lssl.data.batch import Visit
from lssl.synthetic.draws import misregistration, uniform
from lssl.synthetic.stream_anatomy import Anatomy
from lssl.synthetic.stream_contrast import draw_contrast, vary
from lssl.synthetic.stream_course import Course, draw_course
from lssl.synthetic.stream_scanner import Look, draw_look, expose

__all__ = ["Drawn", "Stream"]

_TEXTURE = 0.05  # largest standard deviation of the texture
_BRAIN = torch.tensor(
    [[-75.0, -95.0, -89.0], [75.0, 95.0, 71.0]], dtype=torch.float64
)  # mm in the frame, with a margin


@dataclass(frozen=True, eq=False)
class Drawn:
    """What a pair's number decides before any voxel is made.

    Attributes:
        course: of the subject.
        look: of its images.
        corners: ``(2, 3)`` mm in the true frame, centre of each visit's first voxel.
        rigid: ``(2, 4, 4)`` recorded frame → true frame in mm.
        stream: the generator, from which the voxels are drawn next.
    """

    course: Course
    look: Look
    corners: Tensor
    rigid: Tensor
    stream: torch.Generator


@dataclass(frozen=True)
class Stream:
    """Makes pairs of visits; the same number makes the same pair, to the bit.

    Attributes:
        draw_anatomy: an anatomy, drawn from a generator.
        size: voxels of a visit.
        spacing: mm between them.
        change: factor on the change between the visits.
        same_contrast: share of pairs whose visits have one contrast, varied as from day to day.
        lesions: share of subjects with lesions of white matter.
        lateral: whether classes are told apart by side.
        anywhere: share of heads with a skull that show any box, neck and face too, instead of one around the brain.
    """

    draw_anatomy: Callable[[torch.Generator], Anatomy]
    size: tuple[int, int, int]
    spacing: float
    change: float
    same_contrast: float
    lesions: float
    lateral: bool
    anywhere: float = 0.0

    def draw(self, number: int) -> Drawn:
        """The geometry of pair ``number``: anatomy, course, and where the visits' grids lie."""
        stream = torch.Generator().manual_seed(number)
        anatomy = self.draw_anatomy(stream)
        course, look = draw_course(anatomy, stream, self.change), draw_look(stream)
        extent = self.spacing * (torch.tensor(self.size, dtype=torch.float64) - 1)
        whole = uniform(stream, 0, 1) < self.anywhere and look.stripped == "no"  # without its skull, a head has no neck
        low, high = _head(course) if whole else _BRAIN
        room = (high - low - extent).clamp_min(10) / 2
        centre = room * (2 * torch.rand(3, generator=stream, dtype=torch.float64) - 1) + (low + high) / 2
        corners = torch.stack([centre - extent / 2] * 2)
        rigid = torch.stack([misregistration(centre, self.spacing, stream) for _ in range(2)])
        return Drawn(course, look, corners, rigid, stream)

    def visits(self, number: int, wanted: Sequence[int] = (0, 1)) -> list[Visit]:
        """Visits of pair ``number``, with time 0 and later; their frames are the subject's, as recorded.

        Each visit has a scanner's draws of its own, so that one can be made without the other.

        Args:
            number: of the pair.
            wanted: 0 for the first visit, 1 for the later one.
        """
        drawn = self.draw(number)
        course, stream = drawn.course, drawn.stream
        anatomy = course.anatomy
        contrast = draw_contrast(stream)
        other = contrast if uniform(stream, 0, 1) < self.same_contrast else draw_contrast(stream)
        contrasts = contrast, vary(other, 0.06, stream)
        texture = 1 + uniform(stream, 0, _TEXTURE) * torch.randn(anatomy.code.shape, generator=stream)
        lesions = _lesions(anatomy, uniform(stream, 0, 1) < self.lesions, self.change, stream)
        seeds = torch.randint(2**62, (2,), generator=stream).tolist()
        visits = []
        for visit in wanted:
            scanner = torch.Generator().manual_seed(seeds[visit])
            grid = course.sampling_grid(visit, drawn.corners[visit], self.size, self.spacing)
            made = expose(
                anatomy,
                grid,
                contrasts[visit],
                texture,
                lesions[visit],
                drawn.look,
                self.spacing,
                self.lateral,
                scanner,
            )
            made = dataclasses.replace(
                made,
                affine=self._affine(drawn, visit),
                age=course.ages[visit],
                time=course.ages[visit] - course.ages[0],
            )
            visits.append(made)
        return visits

    def correspond(self, number: int, points: Tensor, first: int, second: int) -> Tensor:
        """Recorded frame points ``(N, 3)`` mm of one visit → where the other visit, as recorded, shows the same."""
        drawn = self.draw(number)
        one, two = drawn.rigid[first], drawn.rigid[second]
        there = drawn.course.correspond(points.double() @ one[:3, :3].T + one[:3, 3], first, second)
        return (there - two[:3, 3]) @ two[:3, :3]

    def _affine(self, drawn: Drawn, visit: int) -> Tensor:
        """``(4, 4)`` index → recorded frame: the grid in the true frame, seen through the misregistration."""
        grid = torch.eye(4, dtype=torch.float64) * self.spacing
        grid[:3, 3], grid[3, 3] = drawn.corners[visit], 1
        return torch.linalg.inv(drawn.rigid[visit]) @ grid


def _head(course: Course) -> tuple[Tensor, Tensor]:
    """Lowest and highest corner in the frame, in mm, of a box that holds the head before it is bent."""
    corners = course.anatomy.corners.double() @ torch.linalg.inv(course.linear).T
    return corners.amin(0), corners.amax(0)


def _lesions(anatomy: Anatomy, wanted: bool, change: float, stream: torch.Generator) -> Tensor:
    """``(2, D, H, W)`` bool, of the map's voxels: lesions of both visits; some appear, grow, shrink or vanish.

    Up to 20 blobs of 2 to 7 mm around voxels of white matter, with an uneven border.
    """
    found = torch.zeros(2, *anatomy.code.shape, dtype=torch.bool)
    if not wanted or not len(anatomy.white):
        return found
    count = int(torch.randint(1, 21, (1,), generator=stream))
    centres = anatomy.white[torch.randint(len(anatomy.white), (count,), generator=stream)].long()
    radius = 2 + 5 * torch.rand(count, 1, generator=stream).square()
    later = radius * (1 + change * (1.6 * torch.rand(count, 1, generator=stream) - 0.8))
    gone = torch.rand(2, count, 1, generator=stream) < 0.15 * min(change, 1)
    sizes = torch.stack([radius, later]).masked_fill(gone, 0)  # (2, count, 1)
    voxel = anatomy.affine[:3, :3].norm(dim=0)
    reach = (9 / voxel).ceil().long().tolist()
    offsets = torch.cartesian_prod(*[torch.arange(-length, length + 1) for length in reach])
    uneven = (offsets * voxel).norm(dim=1) * (1 + 0.25 * torch.randn(count, len(offsets), generator=stream))
    last = torch.tensor(anatomy.code.shape) - 1
    voxels = (centres[:, None] + offsets).clamp_min(0).minimum(last)
    i, j, k = voxels.unbind(-1)
    white = torch.zeros(anatomy.code.shape, dtype=torch.bool)
    white[tuple(anatomy.white.long().T)] = True
    for visit in range(2):
        hit = (uneven <= sizes[visit]) & white[i, j, k]
        found[visit][i[hit], j[hit], k[hit]] = True
    return found
