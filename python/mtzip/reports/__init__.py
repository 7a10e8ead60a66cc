"""What a zip did: numbers, tables, pictures, pages."""
