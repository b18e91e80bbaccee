"""What a Python kernel runs when it starts: figures of matplotlib also become the data they show.

Not imported by the project: the bridge (:mod:`hostruntime.container.inside_bridge`) has the kernel
run this text.  It adds a representation of figures to those that IPython knows, and loads nothing:
matplotlib comes when somebody imports it.  A chart is::

    {"type": "line" | "scatter" | "bar" | "pie" | "unknown", "title", "x_label", "y_label",
     "elements": [{"label", "points": [[x, y], …]} or, of a bar or pie, {"label", "group",
     "value"}]}

and several axes of a figure are ``{"type": "several", "title", "elements": [chart, …]}``.
"""

import typing as _typing


class _OrkestrCharts:
    mime, most = "application/vnd.orkestr.chart+json", 5000

    def install(self) -> None:
        from importlib import import_module

        display = import_module("IPython").get_ipython().display_formatter
        base = import_module("IPython.core.formatters").JSONFormatter
        format_type = import_module("traitlets").Unicode(self.mime)
        # The inline backend takes figures from all formatters before it gives them to its own.
        members = {"format_type": format_type, "pop": lambda *_: None}
        formatter = type("ChartFormatter", (base,), members)(parent=display)
        formatter.for_type_by_name("matplotlib.figure", "Figure", self.charts)
        display.formatters[self.mime] = formatter

    def plain(self, value: _typing.Any) -> _typing.Any:
        item = value.item() if hasattr(value, "item") and not hasattr(value, "isoformat") else value
        if hasattr(item, "isoformat"):
            return item.isoformat()
        if isinstance(item, (int, float)):
            return item if item - item == 0 else None
        return None if item is None else str(item)

    def points(self, xs: _typing.Any, ys: _typing.Any) -> list[_typing.Any]:
        pairs = zip(list(xs)[: self.most], list(ys)[: self.most])  # noqa: B905 - new in 3.10
        return [[self.plain(x), self.plain(y)] for x, y in pairs]

    def label_of(self, artist: _typing.Any) -> str:
        label = str(artist.get_label() or "")
        return "" if label.startswith("_") else label

    def bars(self, axes: _typing.Any) -> list[dict[str, _typing.Any]]:
        found = []
        for group in axes.containers:
            rectangles = [each for each in group if hasattr(each, "get_height")]
            upright = getattr(group, "orientation", "vertical") != "horizontal"
            axis = axes.xaxis if upright else axes.yaxis
            ticks = {
                round(float(at), 6): text.get_text()
                for at, text in zip(axis.get_ticklocs(), axis.get_ticklabels())  # noqa: B905
            }
            for each in rectangles[: self.most]:
                width, height = each.get_width(), each.get_height()
                middle = each.get_x() + width / 2 if upright else each.get_y() + height / 2
                value = height if upright else width
                label = ticks.get(round(float(middle), 6), "") or str(self.plain(middle))
                found.append(
                    {"label": label, "group": self.label_of(group), "value": self.plain(value)}
                )
        return found

    def elements(self, axes: _typing.Any) -> tuple[str, list[dict[str, _typing.Any]]]:
        wedges = [each for each in axes.patches if type(each).__name__ == "Wedge"]
        if wedges:
            return "pie", [
                {
                    "label": self.label_of(each),
                    "group": "",
                    "value": (each.theta2 - each.theta1) / 360,
                }
                for each in wedges
            ]
        if axes.containers and self.bars(axes):
            return "bar", self.bars(axes)
        lines = [
            {"label": self.label_of(each), "points": self.points(*each.get_data(orig=True))}
            for each in axes.get_lines()[:50]
        ]
        dots = [
            {"label": self.label_of(each), "points": self.points(*each.get_offsets().T)}
            for each in axes.collections[:50]
            if type(each).__name__ == "PathCollection"
        ]
        return ("line" if lines else "scatter" if dots else "unknown"), lines + dots

    def chart(self, axes: _typing.Any) -> dict[str, _typing.Any]:
        kind, found = self.elements(axes)
        return {
            "type": kind,
            "title": axes.get_title(),
            "x_label": axes.get_xlabel(),
            "y_label": axes.get_ylabel(),
            "elements": found,
        }

    def charts(self, figure: _typing.Any) -> dict[str, _typing.Any] | None:
        try:
            found = [self.chart(axes) for axes in figure.get_axes()[:16]]
        except Exception:  # noqa: BLE001 - a chart without data is still a picture
            return None
        found = [each for each in found if each["elements"]]
        if len(found) < 2:
            return found[0] if found else None
        title = getattr(figure, "get_suptitle", lambda: "")()
        return {"type": "several", "title": title, "elements": found}


_OrkestrCharts().install()
del _OrkestrCharts
