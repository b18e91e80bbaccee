"""What pages are made of: live parts, forms, charts, coloured output, template tags."""
