"""Building blocks of pages: live parts, forms, charts, coloured output, template tags."""
