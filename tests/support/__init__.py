"""What several test files share: references, arrays, compilation, and the project's folders."""
