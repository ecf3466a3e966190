"""Objects of many images as a table: one row an object, in Parquet files, and the search in it."""
