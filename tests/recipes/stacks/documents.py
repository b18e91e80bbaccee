"""Documents and media."""

from __future__ import annotations

from tests.recipes.stacks.stack import Stack, apt, file

DOCUMENTS = (
    Stack(
        "latex",
        "debian-12",
        (
            apt(
                "texlive-latex-base texlive-latex-recommended texlive-fonts-recommended "
                "latexmk poppler-utils"
            ),
        ),
        (
            (
                file(
                    "/root/paper.tex",
                    "\\documentclass{article}\\usepackage{amsmath,hyperref}\\begin{document}\n"
                    "\\section{Sums}\\label{s} Section~\\ref{s}: $\\sum_{i=1}^{100} i$ is 5050.\n"
                    "\\end{document}\n",
                )
                + "\ncd /root && latexmk -pdf -silent paper.tex >log 2>&1 || cat log; "
                "pdftotext paper.pdf - | tr '\\n' ' '",
                "Section 1",
            ),
        ),
    ),
    Stack(
        "pandoc-and-office",
        "debian-12",
        (apt("pandoc libreoffice-writer-nogui poppler-utils fonts-dejavu-core"),),
        (
            (
                "cd /root && printf '# Title\\n\\n* the *sum* is 5050\\n' > a.md && "
                "pandoc a.md -o a.docx && soffice --headless --convert-to pdf a.docx >/dev/null && "
                "pdftotext a.pdf -",
                "the sum is 5050",
            ),
        ),
    ),
    Stack(
        "ocr",
        "python-3.12",
        (
            apt("tesseract-ocr tesseract-ocr-eng fonts-dejavu-core"),
            "pip install pytesseract pillow",
        ),
        (
            (
                """python - <<'END'
import pytesseract
from PIL import Image, ImageDraw, ImageFont
image = Image.new("L", (600, 100), 255)
font = ImageFont.truetype("/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf", 40)
ImageDraw.Draw(image).text((20, 20), "Invoice 5050", font=font)
print(pytesseract.image_to_string(image))
END""",
                "Invoice 5050",
            ),
        ),
    ),
    Stack(
        "ffmpeg",
        "debian-12",
        (apt("ffmpeg"),),
        (
            (
                "cd /root && ffmpeg -v error -f lavfi -i testsrc=d=2:s=160x120:r=10 "
                "-f lavfi -i sine=d=2 -c:v libx264 -c:a aac -shortest a.mp4 && "
                "ffprobe -v error -show_entries stream=codec_name -show_entries format=duration "
                "-of csv=p=0 a.mp4",
                "h264\naac\n2.0",
            ),
        ),
    ),
    Stack(
        "docs-site",
        "python-3.12",
        (
            "pip install mkdocs-material",
            file(
                "/root/docs/mkdocs.yml", "site_name: Sums\ntheme: {name: material, font: false}\n"
            ),
            file("/root/docs/docs/index.md", "# Sums\n\nThe sum is **5050**.\n"),
        ),
        (
            (
                "cd /root/docs && mkdocs build -q && grep -o '<strong>5050' site/index.html",
                "5050",
            ),
        ),
    ),
)
