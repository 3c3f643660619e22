"""Work behind each public function: from a request to a document."""
