def render(results, docs):
    return ["todo"]
