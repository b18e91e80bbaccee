"""Data science: frames, models, notebooks, pictures."""

from __future__ import annotations

from tests.recipes.stacks.stack import Stack, apt

DATA = (
    Stack(
        "data-science",
        "python-3.12",
        (
            "pip install pandas numpy scikit-learn matplotlib pyarrow",
            """mkdir -p /opt/data && python - <<'END'
import pandas, numpy
x = numpy.arange(1000.0)
pandas.DataFrame({"x": x, "y": 3 * x + 7}).to_parquet("/opt/data/line.parquet")
END""",
        ),
        (
            (
                """python - <<'END'
import pandas, matplotlib
from sklearn.linear_model import LinearRegression
frame = pandas.read_parquet("/opt/data/line.parquet")
model = LinearRegression().fit(frame[["x"]], frame.y)
print(f"{model.coef_[0]:.3f} x + {model.intercept_:.3f}")
matplotlib.use("agg")
frame.plot.scatter("x", "y").figure.savefig("/root/line.png")
END""",
                "3.000 x + 7.000",
            ),
            ("head -c 4 /root/line.png | tail -c 3", "PNG"),
        ),
    ),
    Stack(
        "jupyter",
        "python-3.12",
        (
            "pip install jupyterlab papermill pandas",
            """cd /root && python - <<'END'
import nbformat.v4 as v4, nbformat
code = ["n = 6", "import pandas\\nprint('sum', pandas.Series(range(n)).sum())"]
book = v4.new_notebook(cells=[v4.new_code_cell(one) for one in code])
book.cells[0].metadata.tags = ["parameters"]
book.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "Python"}
nbformat.write(book, "sum.ipynb")
END""",
        ),
        (
            (
                "cd /root && jupyter nbconvert --to markdown --execute --stdout sum.ipynb",
                "sum 15",
            ),
            ("cd /root && papermill sum.ipynb out.ipynb -p n 11 && grep sum out.ipynb", "sum 55"),
            ("jupyter lab --version && jupyter kernelspec list", "python3"),
        ),
    ),
    Stack(
        "duckdb-and-polars",
        "python-3.12",
        (
            "pip install duckdb polars pyarrow",
            'python -c \'import duckdb; duckdb.connect("/opt/shop.duckdb").sql('
            '"create table sold as select * from (values (19), (23)) as sold(price)")\'',
        ),
        (
            (
                """python - <<'END'
import duckdb, polars
sold = duckdb.connect("/opt/shop.duckdb").sql("from sold").pl()
print("sum", sold.select(polars.sum("price")).item())
END""",
                "sum 42",
            ),
        ),
    ),
    Stack(
        "spark",
        "python-3.12",
        (apt("openjdk-17-jre-headless procps"), "pip install pyspark"),
        (
            (
                """python - <<'END' 2>/dev/null
from pyspark.sql import SparkSession
spark = SparkSession.builder.master("local[2]").getOrCreate()
print("sum", spark.range(101).groupBy().sum().first()[0])
END""",
                "sum 5050",
            ),
        ),
    ),
    Stack(
        "r",
        "debian-12",
        (apt("r-base-core r-cran-ggplot2"),),
        (
            (
                "Rscript -e 'x <- 1:50; print(coef(lm(y ~ x, data.frame(x = x, y = 4 * x - 2))))'",
                "-2           4",
            ),
            (
                "cd /root && Rscript -e 'library(ggplot2); "
                'ggsave("cars.png", ggplot(mtcars, aes(wt, mpg)) + geom_point())\' && '
                "head -c 4 cars.png | tail -c 3",
                "PNG",
            ),
        ),
    ),
    Stack(
        "torch",
        "debian-12",
        (apt("python3-torch"),),
        (
            (
                """python3 - <<'END'
import torch
w = torch.zeros(1, requires_grad=True)
for _ in range(100):
    ((w * 3 - 12) ** 2).sum().backward()
    w.data -= 0.01 * w.grad
    w.grad.zero_()
print(f"w is {w.item():.2f}")
END""",
                "w is 4.00",
            ),
        ),
    ),
    Stack(
        "opencv",
        "python-3.12",
        ("pip install opencv-python-headless",),
        (
            (
                """python - <<'END'
import cv2, numpy
image = numpy.zeros((200, 200), numpy.uint8)
cv2.circle(image, (120, 80), 40, 255, -1)
cv2.imwrite("/root/circle.png", image)
found = cv2.findContours(cv2.imread("/root/circle.png", 0), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
print("centre", [round(one) for one in cv2.minEnclosingCircle(found[0][0])[0]])
END""",
                "centre [120, 80]",
            ),
        ),
    ),
)
