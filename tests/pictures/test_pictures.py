"""Pictures show what they claim: sides, marks, boxes, scales, colours; what they look like was looked at."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import nn

from lssl import Backbone, Strategy, ViewSampler
from lssl.pictures.features import draw_features, principal_colours
from lssl.pictures.overlay import draw_segmentations, label_colours
from lssl.pictures.reconstruction import draw_reconstruction
from lssl.pictures.scene import index_of, outline, scene
from lssl.pictures.similarity import draw_similarity, similarity_map
from lssl.pictures.views import draw_views
from lssl.utils.canvas import cut, show, spot
from lssl.views import geometry as geo

RAS = np.diag([2.0, 2.0, 3.0, 1.0])


class Echo(Strategy):
    """Reconstructs by doubling."""

    def terms(self, first, second, batch):
        return {"nothing": first.image.mean()}

    def show_reconstruction(self, view):
        return view.image, 2 * view.clean


def echo(channels: int = 1) -> Echo:
    same = nn.Conv3d(channels, channels, 1, bias=False)
    same.weight.data = torch.eye(channels).view(channels, channels, 1, 1, 1)
    net = nn.Sequential(same, nn.Conv3d(channels, 4, 2, stride=2))
    return Echo(Backbone(net, {"same": "0", "half": "1"}, in_channels=channels), ViewSampler(12, transforms=[]))


@pytest.mark.parametrize("plane", [0, 1, 2])
def test_a_voxel_lies_where_its_mark_is_and_the_right_ear_is_on_the_left(plane: int):
    volume, point = np.zeros((9, 8, 7)), (6, 5, 4)
    volume[point] = 1
    column, row = spot(volume.shape, point, plane)
    assert cut(volume, point, plane)[int(row), int(column)] == 1
    assert cut(volume, point, plane).sum() == 1
    ramps = np.stack(np.meshgrid(*map(np.arange, volume.shape), indexing="ij"), -1)
    picture = cut(ramps, point, plane)
    across, up = ((0, 1), (0, 2), (1, 2))[plane]
    assert (np.diff(picture[0, :, across]) == -1).all()  # index falls, so right (or front) is on the left
    assert (np.diff(picture[:, 0, up]) == -1).all()  # and front or top is up
    assert (picture[..., 3 - across - up] == point[3 - across - up]).all()


def texts(affine: np.ndarray, plane: int = 0) -> list[str]:
    axes = Figure().subplots()
    show(axes, np.zeros((40, 40, 40)), affine, (20, 20, 20), plane=plane)
    return [text.get_text() for text in axes.texts]


def test_letters_say_where_the_sides_are_also_in_mirrored_and_turned_views():
    assert texts(RAS) == ["R", "L", "A", "P", "20 mm"]
    assert texts(RAS, 1) == ["R", "L", "S", "I", "20 mm"]
    assert texts(RAS, 2) == ["A", "P", "S", "I", "20 mm"]
    assert texts(RAS @ np.diag([-1.0, 1, 1, 1])) == ["L", "R", "A", "P", "20 mm"]
    turned = RAS[:, [1, 0, 2, 3]] @ np.diag([1.0, -1, 1, 1])
    assert texts(turned) == ["A", "P", "L", "R", "20 mm"]


def test_the_scale_is_as_long_as_it_says_and_voxels_keep_their_shape():
    axes = Figure().subplots()
    drawn = show(axes, np.zeros((40, 40, 40)), RAS, (20, 20, 20), plane=1)
    bar = axes.lines[0].get_xdata()
    assert (bar[1] - bar[0]) * 40 * 2.0 == pytest.approx(20)  # share of the width × voxels × mm
    assert axes.get_aspect() == pytest.approx(1.5)
    assert drawn.get_array().shape == (40, 40)


def test_the_marked_place_is_one_place_of_the_frame_and_both_views_show_it(make_batch):
    batch = make_batch(1, image="frame")
    shown = scene(echo(3), batch)
    for view in (*shown.visits, shown.first, shown.second):
        index = torch.tensor(index_of(shown.place, view.affine))
        assert geo.contains(index, view.size)
        found = geo.sample(view.image, view.affine, shown.place[:, None])[0, 0]
        torch.testing.assert_close(found.double(), shown.place[0], atol=0.05, rtol=0)


def test_the_outline_is_where_the_view_was_cut(make_batch):
    """Of an unrotated view: a box between the outer faces of its voxels."""
    strategy = echo()
    strategy.views = ViewSampler(12, transforms=[], affine_probability=0.0, flip=(0, 0, 0))
    shown = scene(strategy, make_batch(1, size=(28, 24, 20), affine="unit"))
    visit, axes = shown.visits[0], Figure().subplots()
    point = index_of(shown.place, visit.affine)
    outline(axes, visit, shown.first, point, "red")
    drawn = np.concatenate([path.vertices for path in axes.collections[0].get_paths()])
    low, high = (
        index_of(torch.tensor([corner]).double() @ torch.eye(3).double() + shown.first.affine[:, :3, 3], visit.affine)
        for corner in ([-0.5] * 3, [11.5] * 3)
    )
    corners = np.array([spot(visit.size, low), spot(visit.size, high)])
    np.testing.assert_allclose([drawn.min(0), drawn.max(0)], [corners.min(0), corners.max(0)], atol=0.3)


def test_a_voxel_is_most_similar_to_itself_at_the_marked_place(make_batch):
    """Features that are places, centred: the cosine is 1 in the direction of the place and -1 opposite to it."""
    strategy = echo(3)
    shown, similarity = similarity_map(strategy, scene(strategy, make_batch(1, image="frame", affine="same")), "same")
    whole = shown.visits[1]
    index = [round(value) for value in index_of(shown.place, whole.affine)]
    assert similarity.shape == torch.Size(whole.size)
    offset = shown.place[0] - whole.image[0].flatten(1).mean(1).double()
    places = whole.image[0].flatten(1).T.double() - whole.image[0].flatten(1).mean(1).double()
    expected = torch.nn.functional.cosine_similarity(places, offset[None], dim=1).view(whole.size)
    away = places.norm(dim=1).view(whole.size) > 4  # near the mean the direction is anything
    torch.testing.assert_close(similarity.double()[away], expected[away], atol=0.05, rtol=0)
    assert similarity[tuple(index)] > 0.9


def test_principal_colours_by_numpy():
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, 6, 6, 6, generator=draw) * torch.tensor([5.0, 3, 2, 1, 0.5]).view(1, 5, 1, 1, 1)
    inside = torch.rand(2, 1, 6, 6, 6, generator=draw) > 0.3
    colours, share = principal_colours(features, inside)
    rows = features.movedim(1, -1)[inside[:, 0]].double().numpy()
    rows = rows - rows.mean(0)
    values, vectors = np.linalg.eigh(rows.T @ rows)
    assert share == pytest.approx(values[-3:].sum() / values.sum(), rel=1e-6)
    shown = colours.movedim(1, -1)[inside[:, 0]].numpy()
    for channel in range(3):
        part = rows @ vectors[:, -1 - channel]
        middle = (shown[:, channel] > 0) & (shown[:, channel] < 1)
        assert 0.9 < middle.mean() < 0.97  # 2 % at either end are cut off
        assert abs(np.corrcoef(part[middle], shown[middle, channel])[0, 1]) == pytest.approx(1, abs=1e-6)
    few, _ = principal_colours(features[:, :2], inside)
    assert few.shape == (2, 3, 6, 6, 6)
    assert few.isfinite().all()
    again, _ = principal_colours(-features, inside)
    assert not torch.equal(again, 1 - colours)


def test_all_pictures_of_a_pair_are_drawn_whole(make_batch, tmp_path):
    strategy = echo().train()
    shown = scene(strategy, make_batch(1))
    draw_views(shown, tmp_path / "views.png")
    draw_features(strategy, shown, tmp_path / "features.png")
    draw_similarity({"one": similarity_map(strategy, shown, "half")}, tmp_path / "similarity.png", "half")
    assert draw_reconstruction(strategy, shown, tmp_path / "reconstruction.png")
    assert strategy.training
    for path in tmp_path.iterdir():
        picture = imread(path)
        assert picture[..., :3].std() > 0.05, path
        assert (picture[..., 3] == 1).all(), path  # opaque: as readable on a dark page
        assert (picture[0, 0, :3] == 1).all()
    assert len(list(tmp_path.iterdir())) == 4


def test_a_method_without_reconstruction_draws_none_and_a_dead_tap_no_error(make_batch, tmp_path):
    strategy = echo()
    shown = scene(strategy, make_batch(1))
    strategy.show_reconstruction = lambda view: None
    assert not draw_reconstruction(strategy, shown, tmp_path / "none.png")
    strategy.backbone.network[1].weight.data.fill_(float("nan"))
    draw_features(strategy, shown, tmp_path / "features.png")
    assert not (tmp_path / "none.png").exists()


def test_segmentations_are_painted_on_their_voxels_in_three_planes(tmp_path, monkeypatch):
    image, labels = np.full((20, 24, 16), 0.5), np.zeros((20, 24, 16), int)
    labels[4:9, 10:20, 3:12] = 17
    labels[12:16, 2:8, 3:6] = 53
    panels = []
    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (panels.extend(self.axes), original(self, *a, **k))[1])
    other = np.where(labels == 53, -1, labels)
    draw_segmentations(
        image, {"truth": labels, "found": other}, RAS, tmp_path / "s.png", names={17: "left", 53: "right"}
    )
    assert (tmp_path / "s.png").stat().st_size > 5000
    assert len(panels) == 6
    colours = label_colours([17, 53])
    painted = panels[0].images[1].get_array()
    expected = cut(labels, [4, 10, 3], 0)
    for label, colour in colours.items():
        np.testing.assert_array_equal((painted[..., :3] == colour).all(-1) & (painted[..., 3] > 0), expected == label)
    assert painted[..., 3].max() > 0.8  # outlines
    assert (panels[3].images[1].get_array()[..., 3] > 0).sum() == (cut(other, [4, 10, 3], 0) == 17).sum()
    assert [text.get_text() for text in panels[0].figure.legends[0].get_texts()] == ["left", "right"]


def test_scene_keeps_to_two_visits(make_batch):
    strategy = echo()
    strategy.views.same_visit = 1.0
    batch = make_batch(1)
    shown = scene(strategy, dataclasses.replace(batch, ages=torch.tensor([[40.0, 44.0]])))
    assert (shown.first.age, shown.second.age) == (40, 44)
