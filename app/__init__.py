"""The page: handlers, figures and layout. No tensor maths here."""
