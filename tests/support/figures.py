"""Check the layout of figures."""

from matplotlib.figure import Figure


def is_inside(figure: Figure) -> bool:
    """Return whether all texts and axes are inside the figure."""
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for axes in figure.axes for text in axes.texts]
    frames = [axes.get_tightbbox() for axes in figure.axes]
    return all(
        box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
        for box in [*boxes, *frames]
        if box is not None
    )
